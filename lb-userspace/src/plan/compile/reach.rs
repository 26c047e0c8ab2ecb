//! Why packets to a backend do not get there, or not all of them, judging by its route. Pure.

use super::{map_values, service::Input};
use crate::desired::model::ForwardingMode;
use std::net::IpAddr;

/// Why packets cannot reach a backend in the service's forwarding mode, judging by its route.
pub(super) fn forwarding_problem(input: &Input<'_>, address: IpAddr) -> Option<String> {
    let hop = input.next_hops.get(&address)?;
    match input.wanted.mode {
        ForwardingMode::L2 if hop.is_routed => Some(format!(
            "mode l2 needs workers on this host's own network segment, but {address} is behind a router: \
             use ipip, gue or nat, or move the worker to the segment"
        )),
        ForwardingMode::Nat if !input.settings.attached.contains_key(&hop.ifindex) => Some(format!(
            "mode nat needs the answers of {address}, which arrive on interface {}, where lbd is not attached: \
             add --iface for that interface",
            input.links.get(&hop.ifindex).cloned().unwrap_or_else(|| format!("with index {}", hop.ifindex))
        )),
        _ => None,
    }
}

/// Whether packets that clients of an IPv6 VIP may send at any time do not fit the path to a backend. It takes flows
/// nevertheless: what a router says can be forged, and small packets arrive.
pub(super) fn path_problem(input: &Input<'_>, address: IpAddr) -> Option<String> {
    let hop = input.next_hops.get(&address).filter(|_| input.wanted.vip.is_ipv6())?;
    let mode = map_values::mode_of(input.wanted, input.settings);
    let (mtu, needed) = (hop.path_mtu(), map_values::least_for_ipv6(mode, address));
    (mtu < needed).then(|| {
        format!(
            "the path to {address} carries packets of {mtu} bytes, but IPv6 clients send 1,280 bytes whatever they are \
             told (RFC 8201), which makes {needed} with the outer headers: larger ones are lost; raise the MTU on the path"
        )
    })
}
