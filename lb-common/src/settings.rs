//! Settings that a deployment makes once: a read-only global of each program, set at load time,
//! so that the verifier removes what is switched off.

use crate::map_value;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Settings of the `ingress` program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IngressSettings {
    /// [`crate::ABI_VERSION`] that the loader was built with.
    pub abi_version: u32,
    /// Whether IPv6 packets are looked at (0: passed to the host).
    pub ipv6: u8,
    /// Whether IEEE 802.1Q and 802.1ad tags are looked through.
    pub vlan: u8,
    /// TTL or hop limit of outer headers.
    pub outer_ttl: u8,
    /// Whether counters of bytes and packets are kept.
    pub stats: u8,
    /// Generated ICMP messages per second and CPU; 0: none.
    pub icmp_per_s: u32,
    /// Largest number of messages in a burst.
    pub icmp_burst: u32,
    /// Parts of the program that this deployment may need, see [`features`]; what is off is compiled away.
    pub features: u32,
    /// First source port of mode `nat`.
    pub nat_first: u16,
    /// Last one.
    pub nat_last: u16,
    /// SYNs that are noted for one service, by one processor, in a second; see [`crate::limit::Budgets`].
    pub syns_per_s: u32,
    /// The same of TCP flows from before a transition.
    pub flows_per_s: u32,
    /// The same of UDP flows.
    pub udp_per_s: u32,
    /// What the running kernel can do, see [`kernel`]; code for what it cannot do is removed by the verifier.
    pub kernel: u32,
}

/// Bits of [`IngressSettings::features`].
pub mod features {
    /// Schedulers that choose by load or by turn, and what they track.
    pub const P2C: u32 = 1 << 0;
    /// GUE packets carry the backends that may have the flow instead.
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
    /// Echo, and errors about flows.
    pub const ICMP: u32 = 1 << 7;
    /// Fragments follow their first.
    pub const FRAGMENTS: u32 = 1 << 8;
    /// QUIC is routed by connection id.
    pub const QUIC: u32 = 1 << 9;
    /// Users' programs before and after.
    pub const CHAIN: u32 = 1 << 10;
    /// All of them.
    pub const ALL: u32 = (1 << 11) - 1;
    /// Their names in settings.
    pub const NAMES: [(&str, u32); 11] = [
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
    ];
}

/// Bits of [`IngressSettings::kernel`] and [`DecapSettings::kernel`]: what the loader found that the kernel can do.
/// A helper that a kernel does not know may be called in code that the verifier never reaches.
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
    /// All of them: a kernel of 6.7 or later.
    pub const ALL: u32 = (1 << 4) - 1;
    /// What 5.10 can do: none of them.
    pub const NONE: u32 = 0;
}

impl IngressSettings {
    /// Everything on, nothing metered.
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
    /// Whether IPv6 outer headers are looked at.
    pub ipv6: u8,
    /// Whether tags are looked through.
    pub vlan: u8,
    /// What the running kernel can do, see [`kernel`].
    pub kernel: u32,
}

impl DecapSettings {
    /// Everything on, GUE on its registered port.
    pub const DEFAULT: Self =
        Self { abi_version: crate::ABI_VERSION, gue_port: GUE_PORT, ipv6: 1, vlan: 1, kernel: kernel::ALL };
}

/// First and last source port of mode `nat`, by default: below those that Linux gives to a host's own sockets
/// (32,768 to 60,999), and above those that services usually have.
pub const NAT_PORTS: (u16, u16) = (10_240, 32_767);

/// GUE's registered UDP port (IANA).
pub const GUE_PORT: u16 = 6080;

map_value!(IngressSettings, DecapSettings);
