//! Packets for the services of `bodies::stages`, and tunnels with chains made by hand: what mutations begin with.

use crate::build::{Packet, Vlan, checksum};
use lb_common::{
    Address, Nat, Reply, is_mapped, mapped,
    service::{TCP, UDP},
};

/// Ports of those services.
#[derive(Clone, Copy, Debug)]
pub struct Ports {
    /// Translated.
    pub nat: u16,
    /// Routed by connection id.
    pub quic: u16,
    /// With other backends aboard.
    pub chain: u16,
    /// Without a backend, and answered.
    pub reject: u16,
}

const VIP4: Address = mapped([192, 0, 2, 1]);
const VIP6: Address = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const CLIENT4: Address = mapped([198, 51, 100, 7]);
const CLIENT6: Address = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xc, 7];

/// What clients send.
pub fn clients(ports: Ports) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (client, vip) in [(CLIENT4, VIP4), (CLIENT6, VIP6)] {
        for number in 0..8u16 {
            let vlan = [Vlan::None, Vlan::One, Vlan::Two, Vlan::None][usize::from(number % 4)];
            let reject = [(TCP, ports.reject), (UDP, ports.reject)];
            for (protocol, port) in
                [(TCP, ports.nat), (UDP, ports.nat), (TCP, ports.chain)].into_iter().chain(reject)
            {
                for flags in [0x02, 0x10, 0x11, 0x04] {
                    let mut packet = Packet::new(protocol, (client, 40_000 + number), (vip, port));
                    (packet.flags, packet.vlan) = (flags, vlan);
                    packet.payload.resize([0, 13, 600][usize::from(number % 3)], 7);
                    seeds.push(packet.bytes());
                }
            }
            // Each client has an eighth of them, so that they do not crowd out the rest.
            for id in ids().into_iter().skip(usize::from(number)).step_by(8) {
                let mut packet = Packet::new(UDP, (client, 40_000 + number), (vip, ports.quic));
                (packet.payload, packet.vlan) = (id, vlan);
                seeds.push(packet.bytes());
            }
        }
        // From a VIP to itself: what a worker that answers anything would answer for ever.
        for protocol in [TCP, UDP] {
            seeds.push(Packet::new(protocol, (vip, ports.nat), (vip, ports.nat)).bytes());
        }
        seeds.extend(fragments(client, vip, ports.nat));
        seeds.extend(errors(client, vip, ports));
    }
    seeds
}

/// QUIC headers with ids of every length, known and unknown, long and short.
fn ids() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for len in 0..=20u8 {
        for config in [0u8, 1, 2, 3, 7] {
            let mut id = vec![config << 5 | len.saturating_sub(1).min(31)];
            id.extend([0xc4, 0x60, 0x5e, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
            id.truncate(usize::from(len));
            all.push([&[0x41], &id[..], &[0x55; 12]].concat());
            all.push([&[0xc0, 0, 0, 0, 1, len], &id[..], &[4, 1, 2, 3, 4], &[0x55; 12]].concat());
        }
    }
    all
}

/// A datagram in parts that overlap, come twice, or are cut short.
fn fragments(client: Address, vip: Address, port: u16) -> Vec<Vec<u8>> {
    if !is_mapped(&vip) {
        return Vec::new();
    }
    let mut whole = Packet::new(UDP, (client, 40_000), (vip, port));
    whole.payload.resize(4_000, 3);
    whole.dont_fragment = false;
    let ip = whole.ip();
    let (header, rest) = ip.split_at(20);
    let part = |from: usize, to: usize, more: bool| {
        let to = to.min(rest.len());
        let mut part = header.to_vec();
        part[2..4].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
        part[6..8].copy_from_slice(&((from / 8) as u16 | u16::from(more) << 13).to_be_bytes());
        part[10..12].fill(0);
        let check = (!checksum(&part)).to_be_bytes();
        part[10..12].copy_from_slice(&check);
        [whole.ethernet(), part, rest[from..to].to_vec()].concat()
    };
    vec![
        part(0, 1_480, true),
        part(1_480, 2_960, true),
        part(2_960, 4_008, false),
        part(1_400, 2_880, true),
        part(0, 8, true),
        part(8, 1_480, true),
    ]
}

/// ICMP errors about flows: of routers that saw a worker's packet, and forged ones.
fn errors(client: Address, vip: Address, ports: Ports) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (protocol, port) in [(TCP, ports.nat), (UDP, ports.nat), (UDP, ports.quic), (TCP, ports.chain)] {
        // What the client was sent; and what nobody here sent.
        for (source, destination) in [((vip, port), (client, 40_000)), ((client, 40_000), (vip, port))] {
            let quoted = Packet { flags: 0x10, ..Packet::new(protocol, source, destination) };
            seeds.push(error(client, vip, &quoted.ip()));
        }
    }
    seeds
}

/// "Too big", from a router at the sender's address.
fn error(sender: Address, vip: Address, quote: &[u8]) -> Vec<u8> {
    let is_v4 = is_mapped(&vip);
    let quote = &quote[..quote.len().min(80)];
    let mut icmp =
        [if is_v4 { &[3, 4, 0, 0, 0, 0, 5, 0x14][..] } else { &[2, 0, 0, 0, 0, 0, 5, 0x14] }, quote].concat();
    let pseudo = if is_v4 {
        icmp.clone()
    } else {
        [&sender[..], &vip[..], &(icmp.len() as u32).to_be_bytes(), &[0, 0, 0, 58], &icmp].concat()
    };
    let check = (!checksum(&pseudo)).to_be_bytes();
    icmp[2..4].copy_from_slice(&check);
    let mut packet = Packet::new(UDP, (sender, 0), (vip, 0));
    packet.payload = icmp;
    packet.around(if is_v4 { 1 } else { 58 })
}

/// What a worker of a translated flow answers, and the ICMP error that a router sends about a packet to it.
pub fn answers(nat: &Nat, reply: &Reply, protocol: u8, flags: u8) -> [Vec<u8>; 2] {
    let (worker, own) = ((nat.worker, nat.port.get()), (nat.source, nat.source_port.get()));
    let answer = Packet { flags, ..Packet::new(protocol, worker, own) };
    let mut payload = answer.clone();
    payload.payload.resize(usize::from(reply.flow.source_port.get() % 600), 9);
    let sent = Packet::new(protocol, own, worker);
    [payload.bytes(), error(nat.worker, nat.source, &sent.ip())]
}

/// Tunnels to workers 1 to 4 (10.1.0.N, 2001:db8::1:N), with every chain that can be written: honest ones, loops, too many,
/// to the worker itself, to nobody, of other versions and lengths.
pub fn chains(port: u16) -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (is_ipv6, first) in [(false, 1u8), (true, 1), (false, 3), (true, 4)] {
        let worker = |i: u8| {
            let mut address = if is_ipv6 { VIP6 } else { mapped([10, 1, 0, i]) };
            if is_ipv6 {
                (address[14], address[15]) = (1, i);
            }
            address
        };
        let source = if is_ipv6 { CLIENT6 } else { mapped([10, 9, 9, 9]) };
        for number in 0..8u16 {
            let (client, vip, protocol) =
                if number % 2 == 0 { (CLIENT4, VIP4, 4) } else { (CLIENT6, VIP6, 41) };
            let mut inner = Packet::new(TCP, (client, 40_000 + number), (vip, port));
            inner.flags = [0x02, 0x10, 0x11, 0x10][usize::from(number % 4)];
            for others in [[2, 3], [1, 2], [2, 1], [2, 2], [1, 1], [4, 9], [3, 0], [0, 0]] {
                for (kind, hops) in [
                    (0x12, 0),
                    (0x11, 0),
                    (0x11, 1),
                    (0x10, 2),
                    (0x12, 1),
                    (0x22, 0),
                    (0x13, 0),
                    (0x1f, 0xff),
                ] {
                    let mut gue = vec![if is_ipv6 { 9 } else { 3 }, protocol, 0, 0, 0x6c, 0x62, kind, hops];
                    for other in others {
                        let address = if other == 0 { [0; 16] } else { worker(other) };
                        gue.extend(if is_ipv6 { &address[..] } else { &address[12..] });
                    }
                    let mut tunnel = Packet::new(UDP, (source, 50_000), (worker(first), 6_080));
                    tunnel.payload = [gue, inner.ip()].concat();
                    let mut bytes = tunnel.bytes();
                    // Tunnels have no UDP checksum.
                    let check = 14 + if is_ipv6 { 40 } else { 20 } + 6;
                    bytes[check..check + 2].fill(0);
                    seeds.push(bytes);
                }
            }
        }
    }
    seeds
}
