//! Converts model values to map entries, and back.

use super::{DeploymentSettings, Plan, ServiceId, memory};
use crate::{
    desired::model::{ForwardingMode, NextHop, Ports, Protocol, Service},
    plan::maglev::mix,
};
use lb_common::{
    Address, Backend, Be16, PortRange, ServiceKey, Vip, VipKey,
    backend::{flags, mode},
    is_mapped, mapped,
    service::{NO_SERVICE, TCP, UDP},
    settings::features,
};
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// Converts an address to the dataplane's form.
pub fn to_address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Converts an address from the dataplane's form.
pub fn from_address(address: &Address) -> IpAddr {
    if is_mapped(address) {
        Ipv4Addr::new(address[12], address[13], address[14], address[15]).into()
    } else {
        Ipv6Addr::from(*address).into()
    }
}

/// Key of a service's flow hash and seed of its tables: derived from the service's own seed, else from VIP, ports and
/// protocol, so that it is equal on every ingress host.
pub fn seed(service: &Service) -> [u64; 2] {
    let mut state = 0x6c62_7365_6564_0001;
    let mut absorb = |word: u64| state = mix(state ^ mix(word));
    if let Some(seed) = service.seed {
        absorb(seed);
    } else {
        let address = u128::from_be_bytes(to_address(service.vip));
        absorb((address >> 64) as u64);
        absorb(address as u64);
        let (first, last) = match service.port {
            Ports::One(port) => (port, port),
            Ports::Range(first, last) => (first, last),
            Ports::Any => (0, u16::MAX),
        };
        absorb(u64::from(service.protocol.number()) << 32 | u64::from(first) << 16 | u64::from(last));
    }
    [mix(state ^ 1), mix(state ^ 2)]
}

/// Slots of a service's table: its own setting, or the smallest size with a hundred slots per backend. The two
/// smallest sizes must be set explicitly, and steps are wide, because a change of size moves flows.
pub fn table_size(service: &Service) -> u32 {
    if service.backends.is_empty() { 0 } else { service.slots() }
}

/// Builds a backend's map entry.
pub fn backend_entry(
    address: IpAddr,
    service: &Service,
    service_index: u32,
    next_hop: Option<&NextHop>,
    state: u32,
    settings: &DeploymentSettings,
) -> Backend {
    let mode = mode_of(service, settings);
    let port = match service.mode {
        ForwardingMode::Gue => service.gue_port,
        ForwardingMode::Nat => worker_port(address, service),
        ForwardingMode::Ipip | ForwardingMode::L2 | ForwardingMode::Local => 0,
    };
    let prefix = match (mode, address) {
        (mode::IPIP, IpAddr::V4(_)) => {
            settings.ipip_source_v4.map(|n| (IpAddr::V4(n.network()), 32 - n.prefix_len()))
        }
        (mode::IPIP, IpAddr::V6(_)) => {
            settings.ipip_source_v6.map(|n| (IpAddr::V6(n.network()), 128 - n.prefix_len()))
        }
        (mode::NAT, IpAddr::V4(_)) => {
            settings.nat_source_v4.map(|n| (IpAddr::V4(n.network()), 32 - n.prefix_len()))
        }
        (mode::NAT, IpAddr::V6(_)) => {
            settings.nat_source_v6.map(|n| (IpAddr::V6(n.network()), 128 - n.prefix_len()))
        }
        _ => None,
    };
    let route_source = || next_hop.and_then(|hop| hop.source).map(|source| (source, 0));
    let source = prefix.or_else(route_source).filter(|(source, _)| source.is_ipv4() == address.is_ipv4());
    let mut entry = Backend {
        address: to_address(address),
        flags: flags::USED | state,
        mode,
        port: Be16::new(port),
        service: service_index,
        ..Backend::default()
    };
    if let Some((source, bits)) = source {
        entry.source = to_address(source);
        entry.source_bits = bits.min(64);
    }
    if mode == mode::LOCAL {
        entry.flags |= flags::RESOLVED;
        return entry;
    }
    // Without a source address the program must ask the kernel for one; mode l2 cannot cross a router.
    let next_hop = next_hop.filter(|hop| mode != mode::L2 || !hop.is_routed);
    if let (Some(hop), true) = (next_hop, source.is_some() || mode == mode::L2) {
        entry.next_hop = hop.next_hop;
        let least = if service.vip.is_ipv6() { least_for_ipv6(mode, address) } else { 0 };
        // What a router said never keeps packets of 1,280 bytes from IPv6 clients: they rely on that (RFC 8201 section 4),
        // and anybody can forge it.
        entry.mtu = hop.mtu.min(hop.path_mtu().max(least));
        entry.egress_mac = hop.egress_mac;
        entry.vlan = Be16::new(hop.vlan);
        entry.ifindex = hop.ifindex;
        entry.flags |= flags::RESOLVED;
    }
    entry
}

/// Largest outer packet that a path to a backend must carry for packets of 1,280 bytes.
pub fn least_for_ipv6(mode: u8, address: IpAddr) -> u16 {
    const IPV6_MIN_MTU: usize = 1_280;
    let entry = Backend { address: to_address(address), mode, ..Backend::default() };
    (IPV6_MIN_MTU + lb_ebpf::forward::overhead(&entry).unwrap_or(0)) as u16
}

/// Forwarding mode of a service's backends in the maps.
pub fn mode_of(service: &Service, settings: &DeploymentSettings) -> u8 {
    match service.mode {
        ForwardingMode::Ipip => mode::IPIP,
        ForwardingMode::Gue if has_second_chance_header(service, settings) => mode::GUE_CHAIN,
        ForwardingMode::Gue => mode::GUE,
        ForwardingMode::L2 => mode::L2,
        ForwardingMode::Local => mode::LOCAL,
        ForwardingMode::Nat => mode::NAT,
    }
}

/// Port of the worker; 0 if it is the client's destination port.
fn worker_port(address: IpAddr, service: &Service) -> u16 {
    let backend = service.backends.values().find(|b| b.address == address);
    backend.and_then(|b| b.port).unwrap_or(0)
}

/// Whether a service's packets carry a second chance header with other backends.
pub fn has_second_chance_header(service: &Service, settings: &DeploymentSettings) -> bool {
    service.has_second_chance() && settings.features_off & features::SECOND_CHANCE == 0
}

/// Adds a service to the maps by which packets find it.
pub fn add_service(id: &ServiceId, index: u32, plan: &mut Plan) {
    let vip = to_address(id.vip);
    let entry = plan.vips.entry(VipKey { vip }).or_insert(Vip::EMPTY);
    match id.port {
        Ports::One(port) => {
            let key = ServiceKey { vip, port: Be16::new(port), protocol: id.protocol.number(), pad: 0 };
            plan.index.insert(key, index);
        }
        Ports::Any if id.protocol == Protocol::Tcp => entry.any_tcp = index,
        Ports::Any => entry.any_udp = index,
        Ports::Range(first, last) => {
            let range = PortRange { first, last, protocol: id.protocol.number().into(), service: index };
            let used = entry.range_count as usize;
            // The model limits the number of ranges to what fits.
            if used < entry.ranges.len() {
                let order = |r: &PortRange| (r.protocol, r.first);
                let at = entry.ranges[..used].partition_point(|r| order(r) < order(&range));
                entry.ranges.copy_within(at..used, at + 1);
                entry.ranges[at] = range;
                entry.range_count += 1;
            }
        }
    }
}

/// The inverse of [`add_service`] for a whole plan: services that packets can reach, by index.
pub fn service_ids(plan: &Plan) -> BTreeMap<u32, ServiceId> {
    let mut ids = BTreeMap::new();
    for (key, &index) in &plan.index {
        ids.insert(
            index,
            memory::service_id(from_address(&key.vip), Ports::One(key.port.get()), key.protocol),
        );
    }
    for (key, vip) in &plan.vips {
        let address = from_address(&key.vip);
        for range in &vip.ranges[..(vip.range_count as usize).min(vip.ranges.len())] {
            let ports = Ports::Range(range.first, range.last);
            ids.insert(range.service, memory::service_id(address, ports, range.protocol as u8));
        }
        for (index, protocol) in [(vip.any_tcp, TCP), (vip.any_udp, UDP)] {
            if index != NO_SERVICE {
                ids.insert(index, memory::service_id(address, Ports::Any, protocol));
            }
        }
    }
    ids
}
