//! Tests the whole path to each worker: a connection attempt to the VIP, in the tunnel that clients' packets take. The
//! worker's program must decapsulate it, its stack must have the VIP and a listener, and its reply takes its own routes.
//!
//! The attempt has this host's address; this host's stack resets the reply because it has no such connection.

use super::{
    Finding, WorkerPath,
    packet::{self, TCP, UDP},
};
use crate::desired::model::{ForwardingMode, Ports, Protocol};
use lb_ebpf::forward::GUE_OVERHEAD;
use std::{io, net::IpAddr, time::Duration};

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_millis(500);
const TRIES: usize = 2;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const RST: u8 = 0x04;

/// Tests the paths that can be tested: TCP to one port, in a tunnel between addresses of the VIP's family.
pub fn examine(workers: &[WorkerPath]) -> Vec<Finding> {
    let mut found = Vec::new();
    for (number, worker) in workers.iter().enumerate() {
        let Some(port) = testable_port(worker) else { continue };
        let about = format!("tunnel to {}/{}", worker.service, worker.backend);
        found.push(match attempt(worker, port, number as u16) {
            Ok(Some(WorkerReply::Accepts)) => Finding::ok(about, format!("{}:{port} answers through the tunnel", worker.spec.vip)),
            Ok(Some(WorkerReply::Refuses)) => Finding::fail(
                about,
                format!("the worker decapsulates packets, but nothing listens on {}:{port}", worker.spec.vip),
                "start the service on the worker, or make it listen on all addresses",
            ),
            Ok(None) => Finding::warn(
                about,
                format!("no reply from {}:{port} through the tunnel", worker.spec.vip),
                format!(
                    "check on the worker that `lbd worker` runs with --vip {}, that no firewall drops {}, and that it has a \
                     route to this host",
                    worker.spec.vip,
                    if worker.spec.mode == ForwardingMode::Gue {
                        format!("UDP port {}", worker.spec.gue_port)
                    } else {
                        "IP protocols 4 and 41".to_owned()
                    }
                ),
            ),
            Err(error) => Finding::warn(about, format!("not tested: {error}"), "run `lbctl doctor` as root (sudo)"),
        });
    }
    found
}

/// Returns the port to connect to, if the path can be tested.
fn testable_port(worker: &WorkerPath) -> Option<u16> {
    let is_tunnel = matches!(worker.spec.mode, ForwardingMode::Ipip | ForwardingMode::Gue);
    let is_one_family = worker.spec.vip.is_ipv4() == worker.address.is_ipv4();
    match worker.spec.port {
        Ports::One(port) if is_tunnel && is_one_family && worker.spec.protocol == Protocol::Tcp => Some(port),
        _ => None,
    }
}

/// A worker's reply to a connection attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WorkerReply {
    Accepts,
    Refuses,
}

fn attempt(worker: &WorkerPath, port: u16, number: u16) -> io::Result<Option<WorkerReply>> {
    let (vip, is_ipv4) = (worker.spec.vip, worker.address.is_ipv4());
    let own = packet::own_address(worker.address)?;
    let (sender, listener) = (packet::sender(is_ipv4)?, packet::listener(is_ipv4, TCP)?);
    // Below the ephemeral port range, so that the port does not collide with a connection of this host.
    let own_port = 1_024 + (std::process::id() as u16).wrapping_add(number) % 8_192;
    let packet = encapsulate(worker, own, &syn(own, own_port, vip, port));
    for _ in 0..TRIES {
        packet::send(&sender, &packet, worker.address)?;
        let answer = packet::receive(&listener, is_ipv4, PATIENCE, |source, tcp| {
            // IPv6 raw sockets do not report the sender; the ports identify the reply well enough.
            if source.is_none_or(|source| source == vip) { parse_reply(tcp, port, own_port) } else { None }
        })?;
        if answer.is_some() {
            return Ok(answer);
        }
    }
    Ok(None)
}

/// Builds a TCP SYN in an IP packet.
fn syn(own: IpAddr, own_port: u16, vip: IpAddr, port: u16) -> Vec<u8> {
    let mut tcp = [own_port.to_be_bytes(), port.to_be_bytes()].concat();
    tcp.extend([0x6c, 0x62, 0x64, 0x72, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    packet::write_checksum(&mut tcp, 16, TCP, own, vip);
    packet::ip(TCP, own, vip, &tcp)
}

/// Parses a TCP header from the VIP's port to our port.
fn parse_reply(tcp: &[u8], port: u16, own_port: u16) -> Option<WorkerReply> {
    let ports = [port.to_be_bytes(), own_port.to_be_bytes()].concat();
    let flags = tcp.get(..4).filter(|found| *found == &ports[..]).and(tcp.get(13))?;
    match flags & (SYN | ACK | RST) {
        bits if bits & RST != 0 => Some(WorkerReply::Refuses),
        bits if bits == SYN | ACK => Some(WorkerReply::Accepts),
        _ => None,
    }
}

/// Encapsulates a packet in the service's tunnel.
fn encapsulate(worker: &WorkerPath, own: IpAddr, inner: &[u8]) -> Vec<u8> {
    let inner_protocol = if worker.spec.vip.is_ipv4() { 4 } else { 41 };
    if worker.spec.mode == ForwardingMode::Ipip {
        return packet::ip(inner_protocol, own, worker.address, inner);
    }
    let len = (GUE_OVERHEAD + inner.len()) as u16;
    // Like the XDP program: a source port of the dynamic range, and no checksum.
    let mut udp = [50_000u16.to_be_bytes(), worker.spec.gue_port.to_be_bytes(), len.to_be_bytes()].concat();
    udp.extend([0, 0, 0, inner_protocol, 0, 0]);
    udp.extend(inner);
    packet::ip(UDP, own, worker.address, &udp)
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
        assert_eq!(parse_reply(&answer(SYN | ACK), 80, 2_000), Some(WorkerReply::Accepts));
        assert_eq!(parse_reply(&answer(RST | ACK), 80, 2_000), Some(WorkerReply::Refuses));
        assert_eq!(parse_reply(&answer(ACK), 80, 2_000), None);
        assert_eq!(parse_reply(&answer(SYN | ACK), 80, 2_001), None);
        assert_eq!(parse_reply(&[0; 3], 80, 2_000), None);
    }
}
