//! Computes next hops from links, routes and neighbours. Pure.

use super::netlink::{Effect, Read};
use crate::desired::model::NextHop;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// An interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Name.
    pub name: String,
    /// MAC address; none on interfaces without Ethernet.
    pub mac: Option<[u8; 6]>,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Administratively up, and with carrier.
    pub up: bool,
    /// VLAN parameters, if this is a VLAN interface.
    pub vlan: Option<Vlan>,
}

/// Parameters of a VLAN interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// Index of the interface below.
    pub parent: u32,
    /// Tag.
    pub id: u16,
    /// Whether the tags are IEEE 802.1Q (not 802.1ad).
    pub is_8021q: bool,
}

/// The kernel's route to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Egress interface.
    pub ifindex: u32,
    /// Gateway; none if the address is on the link.
    pub gateway: Option<IpAddr>,
    /// Preferred source address.
    pub source: Option<IpAddr>,
    /// MTU of the route or path, if set.
    pub mtu: Option<u32>,
}

/// A neighbour's relevant state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// MAC address, while the entry is usable.
    pub mac: Option<[u8; 6]>,
    /// Whether the administrator set the entry, so that lbd must not change it.
    pub fixed: bool,
}

/// Why there is no next hop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoHop {
    /// The reason, in words.
    pub why: String,
    /// Whether the kernel cannot send there either. Otherwise it can, but lbd does not know how.
    pub is_unreachable: bool,
}

fn unreachable(why: impl Into<String>) -> NoHop {
    NoHop { why: why.into(), is_unreachable: true }
}

fn for_the_kernel(why: String) -> NoHop {
    NoHop { why, is_unreachable: false }
}

/// All links, routes and neighbours.
#[derive(Clone, Debug, Default)]
pub struct NeighbourTable {
    /// Interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// Routes by backend address; `Err` says why there is none.
    pub routes: BTreeMap<IpAddr, Result<Route, String>>,
    /// Neighbours by interface and address.
    pub neighbours: BTreeMap<(u32, IpAddr), Neighbour>,
}

impl NeighbourTable {
    /// Applies a message; returns what must be recomputed.
    pub fn update(&mut self, read: Read) -> Effect {
        match read {
            Read::Link(index, link) => {
                if self.links.get(&index) == Some(&link) {
                    return Effect::Nothing;
                }
                self.links.insert(index, link);
                // Routes change with their interfaces, and the kernel does not always send a message for them.
                Effect::Routes
            }
            Read::NoLink(index) => {
                self.links.remove(&index);
                self.neighbours.retain(|(ifindex, _), _| *ifindex != index);
                Effect::Routes
            }
            Read::Neighbour(key, neighbour) => {
                let old = self.neighbours.insert(key, neighbour);
                if old == Some(neighbour) { Effect::Nothing } else { Effect::Table }
            }
            Read::NoNeighbour(key) => match self.neighbours.remove(&key) {
                Some(_) => Effect::Table,
                None => Effect::Nothing,
            },
            Read::Route => Effect::Routes,
            Read::Loss => Effect::Loss,
            Read::Other => Effect::Nothing,
        }
    }

    /// Neighbours that must be resolved: next hops on Ethernet without a static entry.
    pub fn needed(&self) -> BTreeSet<(u32, IpAddr)> {
        let routes = self.routes.iter().filter_map(|(address, route)| Some((address, route.as_ref().ok()?)));
        let keys = routes.map(|(address, r)| (r.ifindex, r.gateway.unwrap_or(*address)));
        let usable = |ifindex: &u32| self.links.get(ifindex).is_some_and(|l| l.mac.is_some() && l.up);
        let fixed = |key: &(u32, IpAddr)| self.neighbours.get(key).is_some_and(|n| n.fixed);
        keys.filter(|key| usable(&key.0) && !fixed(key)).collect()
    }

    /// Interfaces that packets can be sent from directly: Ethernet without VLAN.
    pub fn ethernet(&self) -> BTreeMap<u32, String> {
        let sends = self.links.iter().filter(|(_, link)| link.mac.is_some() && link.vlan.is_none());
        sends.map(|(&index, link)| (index, link.name.clone())).collect()
    }

    /// Next hops, and for backends without one the reason.
    pub fn next_hops(&self) -> (BTreeMap<IpAddr, NextHop>, BTreeMap<IpAddr, NoHop>) {
        let (mut found, mut missing) = (BTreeMap::new(), BTreeMap::new());
        for (address, route) in &self.routes {
            let route = route.as_ref().map_err(|why| unreachable(why.as_str()));
            match route.and_then(|route| self.next_hop(*address, route)) {
                Ok(hop) => {
                    found.insert(*address, hop);
                }
                Err(why) => {
                    missing.insert(*address, why);
                }
            }
        }
        (found, missing)
    }

    fn next_hop(&self, address: IpAddr, route: &Route) -> Result<NextHop, NoHop> {
        let link = self.link(route.ifindex)?;
        let (ifindex, vlan, physical) = match link.vlan {
            None => (route.ifindex, 0, link),
            Some(vlan) => {
                let parent = self.link(vlan.parent)?;
                if parent.vlan.is_some() || !vlan.is_8021q {
                    return Err(for_the_kernel(format!(
                        "{} has nested or 802.1ad VLAN tags, which only the kernel handles (QinQ)",
                        link.name
                    )));
                }
                (vlan.parent, vlan.id, parent)
            }
        };
        let egress_mac =
            link.mac.ok_or_else(|| for_the_kernel(format!("{} is not an Ethernet interface", link.name)))?;
        let hop = route.gateway.unwrap_or(address);
        let neighbour = self.neighbours.get(&(route.ifindex, hop)).and_then(|n| n.mac);
        let asked = if hop.is_ipv4() { "ARP" } else { "neighbour discovery" };
        let next_hop = neighbour
            .ok_or_else(|| unreachable(format!("{hop} does not answer {asked} on {}", link.name)))?;
        let mtu = route.mtu.unwrap_or(u32::MAX).min(link.mtu).min(physical.mtu);
        let mtu = u16::try_from(mtu).unwrap_or(u16::MAX);
        let is_routed = route.gateway.is_some();
        let (source, path_mtu) = (route.source, None);
        Ok(NextHop { ifindex, vlan, egress_mac, next_hop, mtu, path_mtu, source, is_routed })
    }

    fn link(&self, index: u32) -> Result<&Link, NoHop> {
        match self.links.get(&index) {
            None => Err(unreachable(format!("interface {index} does not exist"))),
            Some(link) if !link.up => Err(unreachable(format!("{} is down", link.name))),
            Some(link) => Ok(link),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn link(name: &str, mac: u8, mtu: u32) -> Link {
        Link { name: name.into(), mac: Some([mac; 6]), mtu, up: true, vlan: None }
    }

    fn on(ifindex: u32, gateway: Option<&str>) -> Result<Route, String> {
        Ok(Route { ifindex, gateway: gateway.map(ip), source: Some(ip("10.0.0.1")), mtu: None })
    }

    fn neighbour(mac: u8) -> Neighbour {
        Neighbour { mac: Some([mac; 6]), fixed: false }
    }

    fn table() -> NeighbourTable {
        let vlan = |parent, is_8021q| Some(Vlan { parent, id: 100, is_8021q });
        NeighbourTable {
            links: BTreeMap::from([
                (1, Link { name: "lo".into(), mtu: 65_536, up: true, ..Link::default() }),
                (2, link("eth0", 2, 1_500)),
                (3, Link { vlan: vlan(2, true), ..link("eth0.100", 3, 9_000) }),
                (4, Link { vlan: vlan(3, true), ..link("eth0.100.7", 4, 1_500) }),
                (5, Link { up: false, ..link("eth1", 5, 1_500) }),
                (6, Link { vlan: vlan(2, false), ..link("eth0.ad", 6, 1_500) }),
            ]),
            routes: BTreeMap::new(),
            neighbours: BTreeMap::from([
                ((2, ip("10.0.0.254")), neighbour(0xaa)),
                ((2, ip("10.0.0.7")), neighbour(0xbb)),
                ((3, ip("fe80::1")), neighbour(0xcc)),
            ]),
        }
    }

    fn resolve(route: Result<Route, String>) -> Result<NextHop, NoHop> {
        let mut table = table();
        table.routes.insert(ip("10.0.0.7"), route);
        let (found, missing) = table.next_hops();
        match (found.into_values().next(), missing.into_values().next()) {
            (Some(hop), None) => Ok(hop),
            (None, Some(why)) => Err(why),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn direct_routed_and_tagged_backends_resolve() {
        let hop = resolve(on(2, None)).unwrap();
        let direct = NextHop {
            ifindex: 2,
            vlan: 0,
            egress_mac: [2; 6],
            next_hop: [0xbb; 6],
            mtu: 1_500,
            path_mtu: None,
            source: Some(ip("10.0.0.1")),
            is_routed: false,
        };
        assert_eq!(hop, direct);
        let routed = resolve(on(2, Some("10.0.0.254"))).unwrap();
        assert_eq!((routed.next_hop, routed.is_routed), ([0xaa; 6], true));
        // IPv4 over an IPv6 gateway on a VLAN: tag and MAC of the VLAN interface, the smaller MTU.
        let hop = resolve(on(3, Some("fe80::1"))).unwrap();
        let seen = (hop.ifindex, hop.vlan, hop.egress_mac, hop.next_hop, hop.mtu);
        assert_eq!(seen, (2, 100, [3; 6], [0xcc; 6], 1_500));
        let route = Route { mtu: Some(1_400), ..on(2, None).unwrap() };
        assert_eq!(resolve(Ok(route)).unwrap().mtu, 1_400);
    }

    #[test]
    fn unresolved_routes_say_why() {
        let nested = "has nested or 802.1ad VLAN tags, which only the kernel handles (QinQ)";
        for (route, why, is_unreachable) in [
            (Err("no route".to_owned()), "no route".to_owned(), true),
            (on(9, None), "interface 9 does not exist".to_owned(), true),
            (on(5, None), "eth1 is down".to_owned(), true),
            (on(1, None), "lo is not an Ethernet interface".to_owned(), false),
            (on(4, None), format!("eth0.100.7 {nested}"), false),
            (on(6, None), format!("eth0.ad {nested}"), false),
            (on(2, Some("10.0.0.9")), "10.0.0.9 does not answer ARP on eth0".to_owned(), true),
        ] {
            assert_eq!(resolve(route), Err(NoHop { why, is_unreachable }));
        }
    }

    #[test]
    fn messages_change_the_table_only_where_they_differ() {
        let mut table = table();
        table.routes.insert(ip("10.0.0.7"), on(2, None));
        let key = (2, ip("10.0.0.7"));
        assert_eq!(table.update(Read::Neighbour(key, neighbour(0xbb))), Effect::Nothing);
        let failed = Neighbour { mac: None, fixed: false };
        assert_eq!(table.update(Read::Neighbour(key, failed)), Effect::Table);
        assert!(table.next_hops().0.is_empty());
        assert_eq!(table.update(Read::NoNeighbour(key)), Effect::Table);
        assert_eq!(table.update(Read::NoNeighbour(key)), Effect::Nothing);
        assert_eq!(table.update(Read::Link(2, link("eth0", 2, 1_500))), Effect::Nothing);
        assert_eq!(table.update(Read::Link(2, link("eth0", 2, 9_000))), Effect::Routes);
        assert_eq!(table.update(Read::NoLink(3)), Effect::Routes);
        assert!(!table.neighbours.contains_key(&(3, ip("fe80::1"))));
    }

    #[test]
    fn static_neighbours_are_not_requested() {
        let mut table = table();
        table.routes = BTreeMap::from([
            (ip("10.0.0.7"), on(2, None)),
            (ip("10.9.0.1"), on(2, Some("10.0.0.254"))),
            (ip("10.9.0.2"), on(2, Some("10.0.0.254"))),
            (ip("10.9.0.3"), on(5, None)),
            (ip("10.9.0.4"), on(1, None)),
            (ip("10.9.0.5"), Err("no route".into())),
        ]);
        table.neighbours.insert((2, ip("10.0.0.7")), Neighbour { mac: Some([1; 6]), fixed: true });
        assert_eq!(table.needed(), BTreeSet::from([(2, ip("10.0.0.254"))]));
    }
}
