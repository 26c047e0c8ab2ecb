//! Packets that doctor sends, and the raw sockets to send them. IP headers are written here, so that the kernel does not
//! fragment the packets.

use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    io::{self, Read},
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

/// Protocol number of ICMP for IPv4.
pub const ICMP: u8 = 1;
/// Protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;

/// Computes the folded one's complement sum (RFC 1071).
fn sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Returns the bytes of an address.
fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// Writes the checksum of a transport packet at offset `at`.
pub fn write_checksum(payload: &mut [u8], at: usize, protocol: u8, source: IpAddr, destination: IpAddr) {
    let pseudo = if protocol == ICMP {
        Vec::new()
    } else {
        let len = (payload.len() as u32).to_be_bytes();
        [&octets(source)[..], &octets(destination), &len, &[0, 0, 0, protocol]].concat()
    };
    payload[at..at + 2].fill(0);
    let check = !sum(&[&pseudo[..], payload].concat());
    payload[at..at + 2].copy_from_slice(&check.to_be_bytes());
}

/// Builds an IP packet that must not be fragmented.
pub fn ip(protocol: u8, source: IpAddr, destination: IpAddr, payload: &[u8]) -> Vec<u8> {
    let mut packet = match destination {
        IpAddr::V4(_) => {
            let mut header = vec![0x45, 0];
            header.extend((20 + payload.len() as u16).to_be_bytes());
            header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
            header.extend([octets(source), octets(destination)].concat());
            let check = (!sum(&header)).to_be_bytes();
            header[10..12].copy_from_slice(&check);
            header
        }
        IpAddr::V6(_) => {
            let mut header = vec![0x60, 0, 0, 0];
            header.extend((payload.len() as u16).to_be_bytes());
            header.extend([protocol, 64]);
            header.extend([octets(source), octets(destination)].concat());
            header
        }
    };
    packet.extend(payload);
    packet
}

/// Returns the source address of this host's packets to `to`.
pub fn own_address(to: IpAddr) -> io::Result<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.connect(SocketAddr::new(to, 9))?;
    Ok(socket.local_addr()?.ip())
}

/// Opens a socket that sends whole IP packets of one family.
pub fn sender(is_ipv4: bool) -> io::Result<Socket> {
    const RAW: i32 = 255;
    let domain = if is_ipv4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(RAW)))?;
    if is_ipv4 {
        socket.set_header_included_v4(true)?;
    } else {
        socket.set_header_included_v6(true)?;
    }
    Ok(socket)
}

/// Sends a packet; false if it is larger than the interface's MTU.
pub fn send(socket: &Socket, packet: &[u8], to: IpAddr) -> io::Result<bool> {
    match socket.send_to(packet, &SockAddr::from(SocketAddr::new(to, 0))) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Opens a socket that receives packets of one protocol: with their IP header (IPv4), or from the transport header on
/// (IPv6).
pub fn listener(is_ipv4: bool, protocol: u8) -> io::Result<Socket> {
    let domain = if is_ipv4 { Domain::IPV4 } else { Domain::IPV6 };
    Socket::new(domain, Type::RAW, Some(Protocol::from(i32::from(protocol))))
}

/// Passes received packets to `each` until it returns a value or the time is over: the sender (IPv4 only), and the
/// transport packet.
pub fn receive<T>(
    mut socket: &Socket,
    is_ipv4: bool,
    wait: Duration,
    mut each: impl FnMut(Option<IpAddr>, &[u8]) -> Option<T>,
) -> io::Result<Option<T>> {
    let (end, mut buffer) = (Instant::now() + wait, vec![0; 65_536]);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let len = match socket.read(&mut buffer) {
            Ok(len) => len,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let packet = &buffer[..len];
        let answer = if is_ipv4 {
            let header = packet.first().map_or(0, |b| usize::from(b & 15) * 4);
            let source = packet.get(12..16).map(|s| IpAddr::from([s[0], s[1], s[2], s[3]]));
            packet.get(header.max(20)..).and_then(|rest| each(source, rest))
        } else {
            each(None, packet)
        };
        if answer.is_some() {
            return Ok(answer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_add_up() {
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let mut echo = vec![8, 0, 0, 0, 1, 2, 3, 4, 5];
        write_checksum(&mut echo, 2, ICMP, a, b);
        assert_eq!(sum(&echo), 0xffff);
        let packet = ip(ICMP, a, b, &echo);
        assert_eq!((sum(&packet[..20]), packet.len()), (0xffff, 29));
        let (a, b): (IpAddr, IpAddr) = (Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
        let mut echo = vec![128, 0, 0, 0, 1, 2, 3, 4];
        write_checksum(&mut echo, 2, ICMPV6, a, b);
        let pseudo = [&octets(a)[..], &octets(b), &[0, 0, 0, 8], &[0, 0, 0, 58], &echo].concat();
        assert_eq!(sum(&pseudo), 0xffff);
        assert_eq!(ip(ICMPV6, a, b, &echo).len(), 48);
    }
}
