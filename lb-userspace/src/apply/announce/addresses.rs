//! VIPs as addresses of an interface: read, put on, taken off (rtnetlink). What was there before is told from
//! ours by a mark (`IFA_PROTO`, Linux 5.18).

use crate::observed::neighbour::netlink::address_in;
use futures_util::TryStreamExt;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_route::address::{
        AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol, CacheInfo,
    },
};
use std::net::IpAddr;

/// The mark of addresses that `lbd ingress` puts on.
pub const OURS: u8 = 0x6d;

/// An address of this host.
#[derive(Clone, Debug)]
pub struct Found {
    /// The address.
    pub address: IpAddr,
    /// Of this interface.
    pub ifindex: u32,
    /// Carries our mark.
    pub is_marked: bool,
    message: AddressMessage,
}

/// All addresses of this host.
pub async fn read(handle: &Handle) -> Result<Vec<Found>, rtnetlink::Error> {
    let all: Vec<AddressMessage> = handle.address().get().execute().try_collect().await?;
    let found = all.into_iter().filter_map(|message| {
        let mark = AddressAttribute::Protocol(AddressProtocol::Other(OURS));
        Some(Found {
            address: address_in(&message)?,
            ifindex: message.header.index,
            is_marked: message.attributes.contains(&mark),
            message,
        })
    });
    Ok(found.collect())
}

/// Puts a VIP on an interface, marked as ours.
pub async fn put(handle: &Handle, ifindex: u32, vip: IpAddr) -> Result<(), rtnetlink::Error> {
    let length = if vip.is_ipv4() { 32 } else { 128 };
    let mut request = handle.address().add(ifindex, vip, length).replace();
    let message = request.message_mut();
    message.attributes.push(AddressAttribute::Protocol(AddressProtocol::Other(OURS)));
    if vip.is_ipv6() {
        // Others have the same address, by design: detection of duplicates would find them.
        message.header.flags |= AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        // Deprecated: this host's own connections do not choose it as their source.
        let mut lifetime = CacheInfo::default();
        (lifetime.ifa_preferred, lifetime.ifa_valid) = (0, u32::MAX);
        message.attributes.push(AddressAttribute::CacheInfo(lifetime));
    }
    request.execute().await
}

/// Sets an interface up: the loopback interface of a new network namespace is not.
pub async fn set_up(handle: &Handle, ifindex: u32) -> Result<(), rtnetlink::Error> {
    handle.link().set(LinkUnspec::new_with_index(ifindex).up().build()).execute().await
}

/// Takes an address off.
pub async fn take_off(handle: &Handle, found: Found) -> Result<(), rtnetlink::Error> {
    match handle.address().del(found.message).execute().await {
        // Somebody was faster.
        Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::EADDRNOTAVAIL => Ok(()),
        other => other,
    }
}
