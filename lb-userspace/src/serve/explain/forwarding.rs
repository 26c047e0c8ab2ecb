//! How packets to a backend are forwarded, as an explanation shows it.

use lb_common::{Address, Backend, backend, mapped};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// How packets to a backend are encapsulated, and where they leave the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarding {
    /// Forwarding mode.
    pub mode: String,
    /// Outer source address.
    pub outer_source: Option<IpAddr>,
    /// Outer destination address.
    pub outer_destination: IpAddr,
    /// Mode nat: new destination port; None if the port is not translated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Egress interface's index; None when the kernel's FIB decides.
    pub ifindex: Option<u32>,
    /// Next hop's MAC; None when the kernel's FIB decides.
    pub next_hop: Option<String>,
    /// VLAN tag on egress, 0 for none.
    pub vlan: u16,
    /// Largest IP packet of the client that fits, in bytes; None if unknown.
    pub mtu: Option<u32>,
}

impl Forwarding {
    pub(super) fn describe(&self) -> String {
        if self.mode == "local" {
            return "local: this host's own network stack".to_owned();
        }
        let source = self
            .outer_source
            .map_or("source address chosen per packet from the routing table".to_owned(), |s| s.to_string());
        let hop = match (&self.next_hop, self.ifindex) {
            (Some(mac), Some(ifindex)) => format!("next hop {mac} on interface {ifindex}"),
            _ => "next hop chosen by the kernel's FIB".to_owned(),
        };
        let vlan = if self.vlan == 0 { String::new() } else { format!(", VLAN {}", self.vlan) };
        let mtu = self.mtu.map_or(String::new(), |m| format!(", packets up to {m} bytes"));
        if self.mode == "nat" {
            let port = self.port.map_or(String::new(), |port| format!(":{port}"));
            return format!("nat {source} → {}{port}, {hop}{vlan}{mtu}", self.outer_destination);
        }
        if self.mode == "l2" {
            return format!("l2 to {}, {hop}{vlan}{mtu}", self.outer_destination);
        }
        format!("{} {source} → {}, {hop}{vlan}{mtu}", self.mode, self.outer_destination)
    }
}

pub(super) fn forwarding(entry: &Backend, hash: u64) -> Forwarding {
    let resolved = entry.flags & backend::flags::RESOLVED != 0 && entry.mode != backend::mode::LOCAL;
    let has_source =
        backend::mode::is_gue(entry.mode) || matches!(entry.mode, backend::mode::IPIP | backend::mode::NAT);
    let source = lb_ebpf::packet::parse::address(lb_ebpf::forward::outer_source(entry, hash));
    let overhead = lb_ebpf::forward::overhead(entry).unwrap_or(0) as u32;
    Forwarding {
        mode: match entry.mode {
            backend::mode::IPIP => "ipip",
            backend::mode::GUE | backend::mode::GUE_CHAIN => "gue",
            backend::mode::L2 => "l2",
            backend::mode::NAT => "nat",
            backend::mode::LOCAL => "local",
            backend::mode::FORBIDDEN => "forbidden",
            _ => "unknown",
        }
        .to_owned(),
        outer_source: (has_source && entry.source != [0; 16]).then(|| to_ip(source)),
        outer_destination: to_ip(entry.address),
        port: (entry.mode == backend::mode::NAT && entry.port.get() != 0).then_some(entry.port.get()),
        ifindex: resolved.then_some(entry.ifindex),
        next_hop: resolved.then(|| entry.next_hop.map(|b| format!("{b:02x}")).join(":")),
        vlan: if resolved { entry.vlan.get() & 0xfff } else { 0 },
        mtu: (resolved && entry.mtu != 0).then(|| u32::from(entry.mtu).saturating_sub(overhead)),
    }
}

/// Converts an address of the dataplane to a standard IP address.
pub fn to_ip(address: Address) -> IpAddr {
    let v6 = std::net::Ipv6Addr::from(address);
    v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
}

/// Converts a standard IP address to an address of the dataplane.
pub fn from_ip(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lb_common::mapped;

    #[test]
    fn every_mode_with_an_outer_header_has_a_source() {
        use backend::mode::{FORBIDDEN, GUE, GUE_CHAIN, IPIP, L2, LOCAL, NAT};
        for (mode, has_source) in [
            (IPIP, true),
            (GUE, true),
            (GUE_CHAIN, true),
            (NAT, true),
            (L2, false),
            (LOCAL, false),
            (FORBIDDEN, false),
        ] {
            let entry = Backend {
                address: mapped([10, 1, 0, 1]),
                source: mapped([10, 9, 0, 1]),
                mode,
                ..Backend::default()
            };
            assert_eq!(forwarding(&entry, 7).outer_source.is_some(), has_source, "mode {mode}");
        }
    }
}
