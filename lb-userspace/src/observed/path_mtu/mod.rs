//! Path MTUs of tunnels: what routers between this host and workers say about encapsulated packets.
//!
//! An outer packet that does not fit a link further on is answered to this host, whose kernel has no tunnel to match it
//! with. Such an answer lowers the MTU of the backend that it is about, for [`AGE`]; the packet path then tells clients
//! ([RFC 2003](https://www.rfc-editor.org/rfc/rfc2003) section 5.1, RFC 2473 section 7.1, RFC 1191, RFC 8201).
//!
//! Input: ICMP errors, from raw sockets. Output: MTUs by backend address. Called by [`super::neighbour`]. [`message`] is
//! pure.

pub mod message;

use crate::desired::model::NextHop;
use message::TooBig;
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd,
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// How long an MTU is remembered, as Linux does and RFC 1191 section 6.3 suggests: then larger packets are tried again.
pub const AGE: Duration = Duration::from_secs(600);
/// Smallest MTU that is believed: Linux's `min_pmtu` for IPv4, the minimum of IPv6.
const LEAST: [u16; 2] = [552, 1_280];
/// Messages that wait to be read.
const QUEUE: usize = 64;
/// More than a router quotes.
const LONGEST: usize = 2_048;

/// MTUs that routers have told.
#[derive(Clone, Debug, Default)]
pub struct PathMtus {
    told: BTreeMap<IpAddr, (u16, Instant)>,
}

impl PathMtus {
    /// Notes what a router said about a packet to a backend; true if that changes the backend's MTU.
    pub fn hear(&mut self, said: &TooBig, now: Instant) -> bool {
        let least = LEAST[usize::from(said.destination.is_ipv6())];
        let mtu = u16::try_from(said.mtu).unwrap_or(u16::MAX).max(least);
        // A packet that fits is no reason to complain.
        if u32::from(mtu) >= said.len {
            return false;
        }
        let before = self.of(said.destination, now);
        // A larger one may come by another way, and must not undo the first before its time.
        if before.is_some_and(|before| before < mtu) {
            return false;
        }
        self.told.insert(said.destination, (mtu, now + AGE));
        before != Some(mtu)
    }

    fn of(&self, address: IpAddr, now: Instant) -> Option<u16> {
        self.told.get(&address).filter(|(_, until)| *until > now).map(|(mtu, _)| *mtu)
    }

    /// Adds what is known to next hops.
    pub fn apply(&self, hops: &mut BTreeMap<IpAddr, NextHop>, now: Instant) {
        for address in self.told.keys() {
            if let (Some(hop), Some(mtu)) = (hops.get_mut(address), self.of(*address, now))
                && mtu < hop.mtu
            {
                hop.path_mtu = Some(mtu);
            }
        }
    }

    /// Forgets what is too old, or about addresses that are not `wanted` any more.
    pub fn retain(&mut self, wanted: impl Fn(&IpAddr) -> bool, now: Instant) {
        self.told.retain(|address, (_, until)| *until > now && wanted(address));
    }

    /// When the next one is too old.
    pub fn next_end(&self) -> Option<Instant> {
        self.told.values().map(|(_, until)| *until).min()
    }
}

/// What routers say from now on. Without the right to listen (`CAP_NET_RAW`) or a family, there is less or nothing to
/// hear, and that is logged.
pub fn listen() -> mpsc::Receiver<TooBig> {
    let (told, heard) = mpsc::channel(QUEUE);
    for is_ipv6 in [false, true] {
        match open(is_ipv6) {
            Ok(socket) => drop(tokio::spawn(read(socket, is_ipv6, told.clone()))),
            Err(error) => tracing::warn!(
                family = if is_ipv6 { "IPv6" } else { "IPv4" },
                %error,
                "cannot hear what routers say about too large packets to workers: give lbd CAP_NET_RAW, or make sure \
                 that the whole path to each worker has the MTU of this host's interface"
            ),
        }
    }
    heard
}

async fn read(socket: tokio::net::UdpSocket, is_ipv6: bool, told: mpsc::Sender<TooBig>) {
    let mut bytes = [0; LONGEST];
    loop {
        let len = match socket.recv(&mut bytes).await {
            Ok(len) => len,
            Err(error) => {
                tracing::debug!(%error, "cannot read an ICMP message");
                continue;
            }
        };
        let said = if is_ipv6 { message::parse_v6(&bytes[..len]) } else { message::parse_v4(&bytes[..len]) };
        // More than is read are of no use: one is enough for a backend.
        if let Some(said) = said
            && let Err(mpsc::error::TrySendError::Closed(_)) = told.try_send(said)
        {
            return;
        }
    }
}

/// A raw socket that receives only errors about too large packets.
fn open(is_ipv6: bool) -> io::Result<tokio::net::UdpSocket> {
    let (domain, protocol) =
        if is_ipv6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
    let socket = Socket::new(domain, Type::RAW.nonblocking().cloexec(), Some(protocol))?;
    if is_ipv6 {
        let mut blocked = [u32::MAX; 8];
        blocked[0] &= !(1 << message::PACKET_TOO_BIG);
        set_filter(&socket, libc::IPPROTO_ICMPV6, &blocked)?;
    } else {
        const SOL_RAW: libc::c_int = 255;
        set_filter(&socket, SOL_RAW, &[!(1u32 << message::UNREACHABLE)])?;
    }
    // A raw socket reads and waits like one for datagrams.
    tokio::net::UdpSocket::from_std(UdpSocket::from(socket))
}

/// Sets `ICMP_FILTER` or `ICMP6_FILTER`, both of which are option 1: bits of the types that are not received.
fn set_filter(socket: &Socket, level: libc::c_int, blocked: &[u32]) -> io::Result<()> {
    const FILTER: libc::c_int = 1;
    let len = size_of_val(blocked) as libc::socklen_t;
    // SAFETY: the value has the given length.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, FILTER, blocked.as_ptr().cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(mtu: u32) -> TooBig {
        TooBig { destination: "10.1.1.2".parse().unwrap(), mtu, len: 1_600 }
    }

    #[test]
    fn the_smallest_is_remembered_for_its_time() {
        let (mut mtus, start) = (PathMtus::default(), Instant::now());
        let address = said(0).destination;
        let late = start + AGE / 2;
        assert!(mtus.hear(&said(1_500), start));
        assert!(!mtus.hear(&said(1_500), late), "the same");
        assert!(!mtus.hear(&said(1_580), late), "by another way");
        assert!(mtus.hear(&said(1_400), late));
        assert_eq!(mtus.of(address, start + AGE), Some(1_400));
        assert_eq!(mtus.next_end(), Some(late + AGE));
        assert_eq!(mtus.of(address, late + AGE), None);
        assert!(mtus.hear(&said(1_580), late + AGE));
        mtus.retain(|_| true, late + AGE + AGE);
        assert_eq!(mtus.next_end(), None);
    }

    #[test]
    fn nobody_makes_packets_smaller_than_a_link_can_be() {
        let (mut mtus, now) = (PathMtus::default(), Instant::now());
        assert!(mtus.hear(&said(68), now));
        assert_eq!(mtus.of(said(0).destination, now), Some(552));
        let v6 = TooBig { destination: "fd00::2".parse().unwrap(), ..said(600) };
        assert!(mtus.hear(&v6, now));
        assert_eq!(mtus.of(v6.destination, now), Some(1_280));
        // It would have fitted.
        assert!(!PathMtus::default().hear(&TooBig { len: 1_200, ..v6 }, now));
        assert!(!PathMtus::default().hear(&said(1_600), now));
    }
}
