//! rtnetlink: queries the kernel, and decodes its messages.

use super::{
    NeighbourError,
    table::{Link, Neighbour, Route, Vlan},
};
use futures_util::{StreamExt, TryStreamExt, stream::BoxStream};
use rtnetlink::{
    Handle, MulticastGroup, RouteMessageBuilder, new_connection, new_multicast_connection,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        address::{AddressAttribute, AddressMessage},
        link::{InfoData, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, State, VlanProtocol},
        neighbour::{
            NeighbourAddress, NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage,
            NeighbourState,
        },
        route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia},
    },
    sys::SocketAddr,
};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
};

/// The interface's own address in a message, which on point-to-point links also contains the peer's.
pub fn address_in(message: &AddressMessage) -> Option<IpAddr> {
    let find = |local: bool| {
        message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) if local => Some(*ip),
            AddressAttribute::Address(ip) if !local => Some(*ip),
            _ => None,
        })
    };
    find(true).or_else(|| find(false))
}

/// A message of the watched groups.
pub type Message = (NetlinkMessage<RouteNetlinkMessage>, SocketAddr);

/// A decoded message of the watched groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Read {
    /// An interface was added or changed.
    Link(u32, Link),
    /// An interface was removed.
    NoLink(u32),
    /// A neighbour was added or changed.
    Neighbour((u32, IpAddr), Neighbour),
    /// A neighbour was removed.
    NoNeighbour((u32, IpAddr)),
    /// A route, address or rule changed.
    Route,
    /// Messages were lost.
    Loss,
    /// Any other message.
    Other,
}

/// What must be recomputed because of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    Nothing,
    /// Next hops may have changed.
    Table,
    /// Routes must be looked up again.
    Routes,
    /// Links and neighbours must be read again.
    Loss,
}

/// Netlink connection for queries.
pub struct Netlink {
    handle: Handle,
    /// Whether the kernel keeps neighbours resolved by itself (NTF_EXT_MANAGED, Linux 5.16).
    managed: AtomicBool,
}

const GROUPS: [MulticastGroup; 9] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Nexthop,
];

impl Netlink {
    /// Opens one socket for queries and one for watching, so that a flood on one does not affect the other.
    pub fn open() -> Result<(Self, BoxStream<'static, Message>), NeighbourError> {
        let (connection, handle, _) = new_connection()?;
        tokio::spawn(connection);
        let (watch, _, messages) = new_multicast_connection(&GROUPS)?;
        tokio::spawn(watch);
        Ok((Self { handle, managed: AtomicBool::new(true) }, messages.boxed()))
    }

    /// Whether the kernel keeps neighbours resolved after a single [`Netlink::keep`].
    pub fn keeps_neighbours(&self) -> bool {
        self.managed.load(Ordering::Relaxed)
    }

    /// Reads all interfaces.
    pub async fn links(&self) -> Result<BTreeMap<u32, Link>, NeighbourError> {
        let failed = |source| NeighbourError::Read { what: "interfaces", source };
        let all: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(failed)?;
        Ok(all.iter().map(|m| (m.header.index, link(m))).collect())
    }

    /// Reads all neighbours.
    pub async fn neighbours(&self) -> Result<BTreeMap<(u32, IpAddr), Neighbour>, NeighbourError> {
        let failed = |source| NeighbourError::Read { what: "neighbours", source };
        let all: Vec<NeighbourMessage> =
            self.handle.neighbours().get().execute().try_collect().await.map_err(failed)?;
        Ok(all.iter().filter_map(neighbour).collect())
    }

    /// Looks up the kernel's route to an address; the error says why there is none.
    pub async fn route(&self, address: IpAddr) -> Result<Route, String> {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let request = RouteMessageBuilder::<IpAddr>::new().destination_prefix(address, length);
        let request = request.map_err(|e| e.to_string())?.build();
        match self.handle.route().get(request).execute().next().await {
            Some(Ok(message)) => route(&message),
            Some(Err(rtnetlink::Error::NetlinkError(e))) => Err(format!("no route ({})", e.to_io())),
            Some(Err(e)) => Err(format!("no route ({e})")),
            None => Err("no route".to_owned()),
        }
    }

    /// Asks the kernel to resolve a neighbour and to keep it resolved.
    pub async fn keep(&self, ifindex: u32, address: IpAddr) -> Result<(), rtnetlink::Error> {
        if self.managed.load(Ordering::Relaxed) {
            match self.request_neighbour(ifindex, address, true).await {
                Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -libc::EINVAL => {
                    tracing::info!(
                        "this kernel does not keep neighbours resolved by itself: lbd asks it to resolve them regularly"
                    );
                    self.managed.store(false, Ordering::Relaxed);
                }
                result => return result,
            }
        }
        self.request_neighbour(ifindex, address, false).await
    }

    /// Lets the kernel age a neighbour out as usual.
    pub async fn release(&self, ifindex: u32, address: IpAddr) {
        if self.managed.load(Ordering::Relaxed)
            && let Err(error) = self.request_neighbour(ifindex, address, false).await
        {
            tracing::debug!(ifindex, %address, %error, "cannot release a neighbour");
        }
    }

    async fn request_neighbour(
        &self,
        ifindex: u32,
        address: IpAddr,
        managed: bool,
    ) -> Result<(), rtnetlink::Error> {
        let request = self.handle.neighbours().add(ifindex, address).replace();
        let mut request = request.state(NeighbourState::None).flags(NeighbourFlags::Use);
        if managed {
            let flags = NeighbourAttribute::ExtFlags(NeighbourExtFlags::Managed);
            request.message_mut().attributes.push(flags);
        }
        request.execute().await
    }
}

/// Decodes a watched message.
pub fn read((message, _): Message) -> Read {
    use RouteNetlinkMessage as M;
    match message.payload {
        NetlinkPayload::Overrun(_) => Read::Loss,
        NetlinkPayload::InnerMessage(message) => match message {
            M::NewLink(m) => Read::Link(m.header.index, link(&m)),
            M::DelLink(m) => Read::NoLink(m.header.index),
            M::NewNeighbour(m) => neighbour(&m).map_or(Read::Other, |(key, n)| Read::Neighbour(key, n)),
            M::DelNeighbour(m) => neighbour(&m).map_or(Read::Other, |(key, _)| Read::NoNeighbour(key)),
            M::NewRoute(_)
            | M::DelRoute(_)
            | M::NewAddress(_)
            | M::DelAddress(_)
            | M::NewRule(_)
            | M::DelRule(_) => Read::Route,
            _ => Read::Other,
        },
        _ => Read::Other,
    }
}

fn mac(bytes: &[u8]) -> Option<[u8; 6]> {
    bytes.try_into().ok().filter(|mac| *mac != [0; 6])
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link::default();
    let (mut parent, mut vlan) = (None, None);
    let mut carrier = message.header.flags.contains(LinkFlags::LowerUp);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = mac(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(index) => parent = Some(*index),
            LinkAttribute::OperState(State::Up) => carrier = true,
            LinkAttribute::LinkInfo(infos) => vlan = vlan.or_else(|| infos.iter().find_map(vlan_of)),
            _ => {}
        }
    }
    link.up = message.header.flags.contains(LinkFlags::Up) && carrier;
    link.vlan = parent.zip(vlan).map(|(parent, (id, is_8021q))| Vlan { parent, id, is_8021q });
    link
}

fn vlan_of(info: &LinkInfo) -> Option<(u16, bool)> {
    let LinkInfo::Data(InfoData::Vlan(data)) = info else { return None };
    let id = data.iter().find_map(|d| if let InfoVlan::Id(id) = d { Some(*id) } else { None })?;
    let other = data.iter().any(|d| matches!(d, InfoVlan::Protocol(p) if *p != VlanProtocol::Ieee8021Q));
    Some((id, !other))
}

fn neighbour(message: &NeighbourMessage) -> Option<((u32, IpAddr), Neighbour)> {
    use NeighbourState as S;
    let (mut address, mut found) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
            NeighbourAttribute::LinkLayerAddress(bytes) => found = mac(bytes),
            _ => {}
        }
    }
    let fixed = matches!(message.header.state, S::Permanent | S::Noarp);
    let usable = fixed || matches!(message.header.state, S::Reachable | S::Stale | S::Delay | S::Probe);
    Some(((message.header.ifindex, address?), Neighbour { mac: found.filter(|_| usable), fixed }))
}

fn address(found: &RouteAddress) -> Option<IpAddr> {
    match found {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn route(message: &RouteMessage) -> Result<Route, String> {
    match message.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err("the address belongs to this host".to_owned()),
        other => return Err(format!("the route has type {other:?}").to_lowercase()),
    }
    let (mut ifindex, mut gateway, mut source, mut mtu) = (None, None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => ifindex = Some(*index),
            RouteAttribute::Gateway(found) => gateway = address(found),
            RouteAttribute::Via(RouteVia::Inet(v4)) => gateway = Some(IpAddr::V4(*v4)),
            RouteAttribute::Via(RouteVia::Inet6(v6)) => gateway = Some(IpAddr::V6(*v6)),
            RouteAttribute::PrefSource(found) => source = address(found),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|m| if let RouteMetric::Mtu(n) = m { Some(*n) } else { None });
            }
            _ => {}
        }
    }
    let ifindex = ifindex.ok_or_else(|| "the route has no egress interface".to_owned())?;
    Ok(Route { ifindex, gateway, source, mtu: mtu.filter(|n| *n > 0) })
}
