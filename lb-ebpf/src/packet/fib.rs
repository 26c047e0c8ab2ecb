//! Route lookups in the host's own forwarding information base (FIB).

use lb_common::Reason;

/// How to reach a backend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hop {
    /// Next hop's MAC: first four bytes, last two.
    pub next_hop: (u32, u16),
    /// Egress interface's MAC, likewise.
    pub egress_mac: (u32, u16),
    /// VLAN tag to push (network order), 0 for none.
    pub vlan: u16,
    /// Egress interface.
    pub ifindex: u32,
    /// Largest IP packet, 0 if not known.
    pub mtu: u32,
}

/// What the kernel's FIB is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FibQuery {
    /// Outer source, network order, IPv4 as mapped; zero if the FIB is to choose it.
    pub source: [u32; 4],
    /// Outer destination, likewise.
    pub destination: [u32; 4],
    /// Whether the outer header is IPv6.
    pub is_ipv6: bool,
    /// Whether a router will not do as the next hop: [`Reason::NotOnLink`] then.
    pub on_link: bool,
    /// DSCP and ECN.
    pub tos: u8,
    /// Protocol of the outer header.
    pub protocol: u8,
    /// Length of the encapsulated packet.
    pub len: u32,
}

/// What it answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FibAnswer {
    /// The way.
    pub hop: Hop,
    /// Outer source, if it was to choose one.
    pub source: [u32; 4],
}

/// Lookups in the host's own FIB.
pub trait Fib {
    /// The way to a destination; [`Reason::TooBigAnswered`] with the MTU when the packet does not fit.
    fn lookup(&self, query: &FibQuery) -> Result<FibAnswer, (Reason, u32)>;
    /// An interface's MTU, if it is smaller than an IP packet of `len` bytes.
    fn narrower(&self, ifindex: u32, len: u32) -> Option<u32>;
}
