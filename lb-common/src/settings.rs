//! Settings fixed at load time: a read-only global of each program,
//! so that the verifier removes code that is switched off.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Settings of the `ingress` program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IngressSettings {
    /// [`crate::ABI_VERSION`] that the loader was built with.
    pub abi_version: u32,
    /// Whether IPv6 packets are balanced (0: passed to the host).
    pub ipv6: u8,
    /// Whether packets with IEEE 802.1Q and 802.1ad tags are parsed.
    pub vlan: u8,
    /// TTL or hop limit of outer headers.
    pub outer_ttl: u8,
    /// Whether bytes and packets are counted.
    pub stats: u8,
    /// Generated ICMP messages per second and CPU; 0: none.
    pub icmp_per_s: u32,
    /// Largest number of messages in a burst.
    pub icmp_burst: u32,
    /// Parts of the program in use, see [`features`]; the verifier removes the others.
    pub features: u32,
    /// First source port of mode `nat`.
    pub nat_first: u16,
    /// Last source port of mode `nat`.
    pub nat_last: u16,
    /// SYNs that may be cached for one service, by one CPU, per second; see [`crate::rate_limit::Budgets`].
    pub syns_per_s: u32,
    /// TCP flows from before a transition that may be written for one service, by one CPU, per second.
    pub flows_per_s: u32,
    /// UDP flows that may be written for one service, by one CPU, per second.
    pub udp_per_s: u32,
    /// Abilities of the running kernel, see [`kernel`]; the verifier removes code for others.
    pub kernel: u32,
}

/// Bits of [`IngressSettings::features`].
pub mod features {
    /// Schedulers that choose by load or in turn, and what they track.
    pub const P2C: u32 = 1 << 0;
    /// GUE packets carry the other backends that may have the flow.
    pub const SECOND_CHANCE: u32 = 1 << 1;
    /// Forwarding mode `nat`.
    pub const NAT: u32 = 1 << 2;
    /// Forwarding mode `l2`.
    pub const L2: u32 = 1 << 3;
    /// Forwarding mode `local`.
    pub const LOCAL: u32 = 1 << 4;
    /// Deny and allow lists.
    pub const GUARD: u32 = 1 << 5;
    /// Limits of the rate of new flows.
    pub const RATE: u32 = 1 << 6;
    /// ICMP: echo, and errors about flows.
    pub const ICMP: u32 = 1 << 7;
    /// Fragments follow the first fragment of their packet.
    pub const FRAGMENTS: u32 = 1 << 8;
    /// QUIC is routed by connection id.
    pub const QUIC: u32 = 1 << 9;
    /// Users' programs before and after ours.
    pub const CHAIN: u32 = 1 << 10;
    /// Clients of services without a backend are answered (`when_all_down = reset`).
    pub const REJECT: u32 = 1 << 11;
    /// All features.
    pub const ALL: u32 = (1 << 12) - 1;
    /// Names of the features in settings.
    pub const NAMES: [(&str, u32); 12] = [
        ("p2c", P2C),
        ("second-chance", SECOND_CHANCE),
        ("nat", NAT),
        ("l2", L2),
        ("local", LOCAL),
        ("guard", GUARD),
        ("rate", RATE),
        ("icmp", ICMP),
        ("fragments", FRAGMENTS),
        ("quic", QUIC),
        ("chain", CHAIN),
        ("reject", REJECT),
    ];
}

/// Bits of [`IngressSettings::kernel`] and [`DecapSettings::kernel`]: abilities of the kernel that the loader found.
/// A helper that a kernel lacks may be called in code that the verifier never reaches.
pub mod kernel {
    /// Packets may have fragments (5.18: `BPF_F_XDP_HAS_FRAGS`, `bpf_xdp_get_buff_len`, `bpf_xdp_load_bytes`). Set it
    /// only where the program is loaded with that flag; without it, a packet is what lies between `data` and `data_end`.
    pub const FRAGS: u32 = 1 << 0;
    /// `bpf_fib_lookup` takes `BPF_FIB_LOOKUP_SRC` (6.7, and late 6.6).
    pub const FIB_SRC: u32 = 1 << 1;
    /// `bpf_ktime_get_coarse_ns` (5.11).
    pub const COARSE_CLOCK: u32 = 1 << 2;
    /// `bpf_check_mtu` (5.12).
    pub const CHECK_MTU: u32 = 1 << 3;
    /// All abilities: a kernel of 6.7 or later.
    pub const ALL: u32 = (1 << 4) - 1;
    /// No abilities: a kernel of 5.10.
    pub const NONE: u32 = 0;
}

impl IngressSettings {
    /// All features on, no write budgets.
    pub const DEFAULT: Self = Self {
        abi_version: crate::ABI_VERSION,
        ipv6: 1,
        vlan: 1,
        outer_ttl: 64,
        stats: 1,
        icmp_per_s: 1_000,
        icmp_burst: 100,
        features: features::ALL,
        nat_first: NAT_PORTS.0,
        nat_last: NAT_PORTS.1,
        syns_per_s: u32::MAX,
        flows_per_s: u32::MAX,
        udp_per_s: u32::MAX,
        kernel: kernel::ALL,
    };
}

/// Settings of the `decap` program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DecapSettings {
    /// [`crate::ABI_VERSION`] that the loader was built with.
    pub abi_version: u32,
    /// UDP port on which GUE arrives, host byte order.
    pub gue_port: u16,
    /// Whether packets with IPv6 outer headers are decapsulated.
    pub ipv6: u8,
    /// Whether packets with VLAN tags are parsed.
    pub vlan: u8,
    /// What the running kernel can do, see [`kernel`].
    pub kernel: u32,
}

impl DecapSettings {
    /// All features on, GUE on its registered port.
    pub const DEFAULT: Self =
        Self { abi_version: crate::ABI_VERSION, gue_port: GUE_PORT, ipv6: 1, vlan: 1, kernel: kernel::ALL };
}

/// Default range of source ports of mode `nat`: below the ephemeral ports of Linux (32,768 to 60,999), and above the
/// usual ports of services.
pub const NAT_PORTS: (u16, u16) = (10_240, 32_767);

/// Registered UDP port of GUE (IANA).
pub const GUE_PORT: u16 = 6080;

map_value!(IngressSettings, DecapSettings);
