//! Tries the whole way to each worker: a connection attempt to the VIP, in the tunnel that clients' packets take. The
//! worker's program must unpack it, its stack must have the VIP and a listener, and its answer comes by its own routes.
//!
//! The attempt is made from this host's address; the answer is reset by this host's stack, which knows of no connection.

use super::{
    Finding, WorkerPath,
    packet::{self, TCP, UDP},
};
use crate::desired::model::{ForwardingMode, Ports, Protocol};
use lb_ebpf::forward::GUE_OVERHEAD;
use std::{io, net::IpAddr, time::Duration};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(500);
const TRIES: usize = 2;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

/// Tries those that can be tried: TCP to one port, in a tunnel between addresses of the VIP's family.
pub fn examine(ways: &[WorkerPath]) -> Vec<Finding> {
    let mut found = Vec::new();
    for (number, way) in ways.iter().enumerate() {
        let Some(port) = port(way) else { continue };
        let about = format!("tunnel to {}/{}", way.service, way.backend);
        found.push(match attempt(way, port, number as u16) {
            Ok(Some(Answer::Accepts)) => Finding::ok(about, format!("{}:{port} answers through it", way.spec.vip)),
            Ok(Some(Answer::Refuses)) => Finding::fail(
                about,
                format!("the worker unpacks it, and nobody listens at {}:{port}", way.spec.vip),
                "start the service there, or let it listen on all addresses",
            ),
            Ok(None) => Finding::warn(
                about,
                format!("no answer from {}:{port} through it", way.spec.vip),
                format!(
                    "on the worker: is `lbd worker` running with --vip {}, does a firewall drop {}, and does it have a \
                     route to this host?",
                    way.spec.vip,
                    if way.spec.mode == ForwardingMode::Gue {
                        format!("UDP port {}", way.spec.gue_port)
                    } else {
                        "IP protocols 4 and 41".to_owned()
                    }
                ),
            ),
            Err(error) => Finding::warn(about, format!("not tried: {error}"), "run it as root (sudo)"),
        });
    }
    found
}

fn port(way: &WorkerPath) -> Option<u16> {
    let is_tunnel = matches!(way.spec.mode, ForwardingMode::Ipip | ForwardingMode::Gue);
    let is_one_family = way.spec.vip.is_ipv4() == way.address.is_ipv4();
    match way.spec.port {
        Ports::One(port) if is_tunnel && is_one_family && way.spec.protocol == Protocol::Tcp => Some(port),
        _ => None,
    }
}

/// What a worker says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Accepts,
    Refuses,
}

fn attempt(way: &WorkerPath, port: u16, number: u16) -> io::Result<Option<Answer>> {
    let (vip, is_ipv4) = (way.spec.vip, way.address.is_ipv4());
    let own = packet::own_address(way.address)?;
    let (sender, listener) = (packet::sender(is_ipv4)?, packet::listener(is_ipv4, TCP)?);
    // Below the ports that the kernel gives to sockets, so that no connection of this host is met.
    let own_port = 1_024 + (std::process::id() as u16).wrapping_add(number) % 8_192;
    let packet = wrapped(way, own, &syn(own, own_port, vip, port));
    for _ in 0..TRIES {
        packet::send(&sender, &packet, way.address)?;
        let answer = packet::hear(&listener, is_ipv4, PATIENCE, |source, tcp| {
            // IPv6 does not tell whose it is; the ports do well enough.
            if source.is_none_or(|source| source == vip) { read(tcp, port, own_port) } else { None }
        })?;
        if answer.is_some() {
            return Ok(answer);
        }
    }
    Ok(None)
}

/// A connection attempt.
fn syn(own: IpAddr, own_port: u16, vip: IpAddr, port: u16) -> Vec<u8> {
    let mut tcp = [own_port.to_be_bytes(), port.to_be_bytes()].concat();
    tcp.extend([0x6c, 0x62, 0x64, 0x72, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    packet::finish(&mut tcp, 16, TCP, own, vip);
    packet::ip(TCP, own, vip, &tcp)
}

/// What a TCP header from the VIP's port to ours says.
fn read(tcp: &[u8], port: u16, own_port: u16) -> Option<Answer> {
    let ports = [port.to_be_bytes(), own_port.to_be_bytes()].concat();
    let flags = tcp.get(..4).filter(|found| *found == &ports[..]).and(tcp.get(13))?;
    match flags & (SYN | ACK | RST) {
        bits if bits & RST != 0 => Some(Answer::Refuses),
        bits if bits == SYN | ACK => Some(Answer::Accepts),
        _ => None,
    }
}

/// The packet in the service's tunnel.
fn wrapped(way: &WorkerPath, own: IpAddr, inner: &[u8]) -> Vec<u8> {
    let inner_protocol = if way.spec.vip.is_ipv4() { 4 } else { 41 };
    if way.spec.mode == ForwardingMode::Ipip {
        return packet::ip(inner_protocol, own, way.address, inner);
    }
    let len = (GUE_OVERHEAD + inner.len()) as u16;
    // As the program does it: a port of the dynamic range, and no checksum.
    let mut udp = [50_000u16.to_be_bytes(), way.spec.gue_port.to_be_bytes(), len.to_be_bytes()].concat();
    udp.extend([0, 0, 0, inner_protocol, 0, 0]);
    udp.extend(inner);
    packet::ip(UDP, own, way.address, &udp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_by_ports_and_flags() {
        let answer = |flags: u8| {
            let mut tcp = [80u16.to_be_bytes(), 2_000u16.to_be_bytes()].concat();
            tcp.extend([0; 9]);
            tcp.push(flags);
            tcp
        };
        assert_eq!(read(&answer(SYN | ACK), 80, 2_000), Some(Answer::Accepts));
        assert_eq!(read(&answer(RST | ACK), 80, 2_000), Some(Answer::Refuses));
        assert_eq!(read(&answer(ACK), 80, 2_000), None);
        assert_eq!(read(&answer(SYN | ACK), 80, 2_001), None);
        assert_eq!(read(&[0; 3], 80, 2_000), None);
    }
}
