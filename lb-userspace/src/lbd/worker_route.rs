//! A worker's next hop towards clients, for replies that its XDP program sends itself (SYN cookies).
//!
//! Input: the kernel's routes, neighbours and links. Output: the next hop of each family in the program's map, while it is
//! known; without it the stack answers. Clients are reached by the default route, which is found by looking up
//! documentation addresses. Called by [`crate::lbd::worker`].

use crate::{apply::dataplane::DecapDataplane, observed::neighbour::netlink::Netlink};
use lb_common::reply::ReplyHop;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// How often to look up the next hop: a gateway's MAC changes when a router fails over.
const INTERVAL: Duration = Duration::from_secs(2);
/// Addresses reserved for documentation (RFC 5737, RFC 3849), to which no host has a specific route.
const PROBE_ADDRESSES: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// Keeps the next hops of both families up to date, forever.
pub async fn keep_updated(decap: Arc<Mutex<DecapDataplane>>) {
    let kernel = match Netlink::open() {
        Ok((kernel, _)) => kernel,
        Err(error) => {
            tracing::warn!(%error, "cannot open netlink: the network stack sends SYN cookies instead of the XDP program");
            return;
        }
    };
    loop {
        for address in PROBE_ADDRESSES {
            let hop = lookup_next_hop(&kernel, address).await;
            let mut decap = decap.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = decap.set_reply_hop(address.is_ipv6(), hop) {
                tracing::warn!(%error, "cannot write the next hop towards clients to the map");
            }
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Looks up the next hop towards an address; None if it is not known (yet).
async fn lookup_next_hop(kernel: &Netlink, address: IpAddr) -> Option<ReplyHop> {
    let route = kernel.route(address).await.ok()?;
    let gateway = route.gateway?;
    // Makes the kernel resolve the gateway and keep it resolved.
    if let Err(error) = kernel.keep(route.ifindex, gateway).await {
        tracing::debug!(%error, %gateway, "cannot resolve the gateway");
    }
    let neighbours = kernel.neighbours().await.ok()?;
    let next_hop = neighbours.get(&(route.ifindex, gateway))?.mac?;
    let links = kernel.links().await.ok()?;
    let link = links.get(&route.ifindex)?;
    // The program does not push VLAN tags.
    if link.vlan.is_some() || !link.up {
        return None;
    }
    Some(ReplyHop { next_hop, egress_mac: link.mac?, ifindex: route.ifindex, ..ReplyHop::default() })
}
