//! A small world: one VIP per family, one TCP and one UDP service, a few backends.

use crate::build::Packet;
use lb_common::{
    Address, Backend, Be16, FlowKey, ServiceKey, ServiceView, Slot, Vip, VipKey,
    backend::{flags, mode},
    mapped,
    service::{TCP, UDP},
    settings::IngressSettings,
};
use lb_ebpf::{
    native::{HashTables, VecFrame},
    packet::parse::{Headers, parse},
};
use proptest::test_runner::Config as ProptestConfig;

/// The IPv4 VIP.
pub const VIP4: Address = mapped([192, 0, 2, 1]);
/// The IPv6 VIP.
pub const VIP6: Address = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// A client.
pub const CLIENT4: Address = mapped([198, 51, 100, 7]);
/// A client.
pub const CLIENT6: Address = [0x20, 1, 0x0d, 0xb8, 0, 0xc, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
/// Service on both VIPs, TCP port 80.
pub const TCP_SERVICE: u32 = 1;
/// Service on both VIPs, UDP port 53.
pub const UDP_SERVICE: u32 = 2;
/// Idle time of its flows.
pub const UDP_TIMEOUT_S: u32 = 60;

/// A backend of the TCP service, reached by 4in4 through interface 1.
pub fn backend(index: u32) -> Backend {
    Backend {
        address: mapped([10, 1, 0, index as u8]),
        source: mapped([10, 9, 0, 0]),
        next_hop: [2, 0, 0, 0, 1, index as u8],
        mtu: 0,
        egress_mac: [2, 0, 0, 0, 0, 1],
        vlan: Be16::new(0),
        ifindex: 1,
        flags: flags::USED | flags::RESOLVED,
        mode: mode::IPIP,
        source_bits: 16,
        port: Be16::new(6080),
        service: TCP_SERVICE,
    }
}

/// Tables whose TCP and UDP service have all slots like `slot`, and backends 1 to 9 (TCP), 11 to 19 (UDP).
pub fn tables(tcp: Slot, udp: Slot) -> HashTables {
    let mut tables = HashTables::default();
    let view = ServiceView {
        seed: [0x1234_5678, 0x9abc_def0],
        slot_count: 251,
        protocol: TCP,
        udp_timeout_s: UDP_TIMEOUT_S,
        ..ServiceView::default()
    };
    tables.slots = [vec![tcp; 251], vec![udp; 251]].concat();
    tables.services.insert(TCP_SERVICE, view);
    tables.services.insert(UDP_SERVICE, ServiceView { slot_base: 251, protocol: UDP, ..view });
    for vip in [VIP4, VIP6] {
        let key = |port, protocol| ServiceKey { vip, port: Be16::new(port), protocol, pad: 0 };
        tables.service_index.insert(key(80, TCP), TCP_SERVICE);
        tables.service_index.insert(key(53, UDP), UDP_SERVICE);
        tables.vips.insert(VipKey { vip }, Vip::EMPTY);
    }
    for i in 1..10 {
        tables.backends.insert(i, backend(i));
        tables.backends.insert(10 + i, Backend { service: UDP_SERVICE, ..backend(10 + i) });
    }
    tables
}

/// A packet of the client to the TCP service with these flags.
pub fn tcp(flags: u8, port: u16) -> Packet {
    Packet { flags, ..Packet::new(TCP, (CLIENT4, port), (VIP4, 80)) }
}

/// A packet of the client to the UDP service.
pub fn udp(port: u16) -> Packet {
    Packet::new(UDP, (CLIENT4, port), (VIP4, 53))
}

/// Its headers.
pub fn headers(packet: &Packet) -> Headers {
    parse(&VecFrame::new(&packet.bytes()), &IngressSettings::DEFAULT)
        .expect("the builder's packets are whole")
}

/// Its key in the flow tables.
pub fn key(packet: &Packet) -> FlowKey {
    FlowKey {
        source: packet.source.0,
        source_port: Be16::new(packet.source.1),
        port: Be16::new(packet.destination.1),
        service: if packet.protocol == TCP { TCP_SERVICE } else { UDP_SERVICE },
    }
}

/// So many cases of a property, unless `PROPTEST_CASES` says otherwise. Failures are kept as plain tests,
/// not in files of seeds.
pub fn cases(n: u32) -> ProptestConfig {
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    if std::env::var_os("PROPTEST_CASES").is_some() { config } else { ProptestConfig { cases: n, ..config } }
}
