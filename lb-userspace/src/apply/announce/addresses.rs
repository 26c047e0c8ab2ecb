//! VIPs as addresses of an interface: read, added, removed (rtnetlink). A mark (`IFA_PROTO`, Linux 5.18) tells the
//! addresses that lbd added from others.

use crate::observed::neighbour::netlink::address_in;
use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_route::address::{
        AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, CacheInfo,
    },
};
use std::net::IpAddr;

/// Mark of addresses that `lbd ingress` adds.
pub const OURS: u8 = 0x6d;

/// An address of this host.
#[derive(Clone, Debug)]
pub struct HostAddress {
    /// The address.
    pub address: IpAddr,
    /// Index of its interface.
    pub ifindex: u32,
    /// Whether the address has the mark.
    pub is_marked: bool,
    message: AddressMessage,
}

/// Lists all addresses of this host.
pub async fn read(handle: &Handle) -> Result<Vec<HostAddress>, rtnetlink::Error> {
    let all: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
    let found = all.into_iter().filter_map(|message| {
        let mark = AddressAttribute::Protocol(AddressProtocol::Other(OURS));
        Some(HostAddress {
            address: address_in(&message)?,
            ifindex: message.header.index,
            is_marked: message.attributes.contains(&mark),
            message,
        })
    });
    Ok(found.collect())
}

/// Adds a VIP to an interface, with the mark.
pub async fn add(handle: &Handle, ifindex: u32, vip: IpAddr) -> Result<(), rtnetlink::Error> {
    let length = if vip.is_ipv4() { 32 } else { 128 };
    let mut request = handle.address().add(ifindex, vip, length).replace();
    let message = request.message_mut();
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(OURS)));
    if vip.is_ipv6() {
        // Other hosts have the same address by design, and duplicate address detection would find them.
        message.header.flags |= AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        // Deprecated, so that this host's own connections do not choose it as their source.
        let mut lifetime = CacheInfo::default();
        (lifetime.ifa_preferred, lifetime.ifa_valid) = (0, u32::MAX);
        message.attributes.push(AddressAttribute::CacheInfo(lifetime));
    }
    request.execute().await
}

/// Sets an interface up: in a new network namespace, the loopback interface is down.
pub async fn set_up(handle: &Handle, ifindex: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(ifindex).up().build()).execute().await
}

/// Removes an address.
pub async fn remove(handle: &Handle, address: HostAddress) -> Result<(), rtnetlink::Error> {
    match handle.address().del(address.message).execute().await {
        // Something else has removed it already.
        Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::EADDRNOTAVAIL => Ok(()),
        other => other,
    }
}
