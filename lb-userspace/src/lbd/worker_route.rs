//! A worker's way back to clients, for answers that its XDP program gives itself (SYN cookies).
//!
//! Input: the kernel's routes, neighbours and links. Output: the way of each family in the program's map, as
//! long as it is known; without it the stack answers. Clients are reached by the default route: it is found by
//! asking for addresses that nobody has. Called by [`crate::lbd::worker`].

use crate::{apply::dataplane::DecapDataplane, observed::neighbour::netlink::Kernel};
use lb_common::reply::ReplyHop;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How often the way is looked up: a gateway's MAC changes when a router fails over.
const EVERY: Duration = Duration::from_secs(2);
/// Of the blocks that are kept for documentation (RFC 5737, RFC 3849): no host has a route of its own to them.
const NOBODY: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// Keeps both ways up to date, for ever.
pub async fn follow(decap: Arc<Mutex<DecapDataplane>>) {
    let kernel = match Kernel::open() {
        Ok((kernel, _)) => kernel,
        Err(error) => {
            tracing::warn!(%error, "SYN cookies are left to the stack");
            return;
        }
    };
    loop {
        for address in NOBODY {
            let hop = way(&kernel, address).await;
            let mut decap = decap.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = decap.set_reply_hop(address.is_ipv6(), hop) {
                tracing::warn!(%error, "the way to clients cannot be noted");
            }
        }
        tokio::time::sleep(EVERY).await;
    }
}

/// The way to an address; None if it is not known (yet).
async fn way(kernel: &Kernel, address: IpAddr) -> Option<ReplyHop> {
    let route = kernel.route(address).await.ok()?;
    let gateway = route.gateway?;
    // Asks the kernel to resolve the gateway, and to keep it so.
    if let Err(error) = kernel.keep(route.ifindex, gateway).await {
        tracing::debug!(%error, %gateway, "cannot be resolved");
    }
    let neighbours = kernel.neighbours().await.ok()?;
    let next_hop = neighbours.get(&(route.ifindex, gateway))?.mac?;
    let links = kernel.links().await.ok()?;
    let link = links.get(&route.ifindex)?;
    // A VLAN interface's tag is not pushed here.
    if link.vlan.is_some() || !link.up {
        return None;
    }
    Some(ReplyHop { next_hop, egress_mac: link.mac?, ifindex: route.ifindex, ..ReplyHop::default() })
}
