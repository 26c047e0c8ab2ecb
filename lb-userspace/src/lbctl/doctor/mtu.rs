//! Measures how large a packet may be on the way to a worker: pings that must not be fragmented, of sizes between the
//! least that every path takes and what the first link does, halving the rest each time. A router's ICMP error is
//! believed for the next size to try, and its silence (a black hole) is found out all the same.

use super::{
    Finding,
    packet::{self, ICMP, ICMPV6},
};
use socket2::Socket;
use std::{collections::BTreeMap, io, net::IpAddr, time::Duration};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_millis(300);
/// How often a size is tried.
const TRIES: u16 = 2;
/// Workers measured at once.
const AT_ONCE: usize = 32;

/// What a path takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// IP packets of so many bytes.
    Takes(u16),
    /// Nobody answers even small ones.
    Silent,
}

/// Smallest packets that any path must take (RFC 791 has hosts take 576; RFC 8200).
fn least(address: IpAddr) -> u16 {
    if address.is_ipv4() { 576 } else { 1_280 }
}

/// Measures the paths to these addresses, whose first links take so much.
pub fn measure(targets: &BTreeMap<IpAddr, u16>) -> io::Result<BTreeMap<IpAddr, Path>> {
    let all: Vec<(IpAddr, u16)> = targets.iter().map(|(address, mtu)| (*address, *mtu)).collect();
    let mut paths = BTreeMap::new();
    for some in all.chunks(AT_ONCE) {
        let results: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = some
                .iter()
                .enumerate()
                .map(|(i, &(address, mtu))| scope.spawn(move || (address, path(address, mtu, i as u16))))
                .collect();
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        for (address, path) in results {
            match path {
                Ok(path) => drop(paths.insert(address, path)),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
                // No route, for one: that is said elsewhere.
                Err(_) => drop(paths.insert(address, Path::Silent)),
            }
        }
    }
    Ok(paths)
}

/// What came of one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Arrived,
    /// Somebody says what would fit, if not just that this does not.
    TooBig(Option<u16>),
    Lost,
}

fn path(address: IpAddr, link_mtu: u16, number: u16) -> io::Result<Path> {
    let mut pinger = Pinger::new(address, number)?;
    search(least(address), link_mtu, |size| pinger.try_size(size))
}

/// Finds the largest size that arrives.
fn search(least: u16, most: u16, mut attempt: impl FnMut(u16) -> io::Result<Outcome>) -> io::Result<Path> {
    let most = most.max(least);
    // What somebody said that fits, and is still to be tried.
    let mut said = match attempt(most)? {
        Outcome::Arrived => return Ok(Path::Takes(most)),
        Outcome::TooBig(said) => said,
        Outcome::Lost => None,
    };
    if attempt(least)? != Outcome::Arrived {
        return Ok(Path::Silent);
    }
    let (mut fits, mut too_big) = (least, most);
    while too_big - fits > 1 {
        let word = said.take().filter(|size| (fits + 1..too_big).contains(size));
        let size = word.unwrap_or(fits + (too_big - fits) / 2);
        match attempt(size)? {
            Outcome::Arrived => {
                fits = size;
                // If the word is true, one more is too much.
                said = word.map(|size| size + 1);
            }
            outcome => {
                too_big = size;
                said = if let Outcome::TooBig(said) = outcome { said } else { None };
            }
        }
    }
    Ok(Path::Takes(fits))
}

/// Pings one address.
struct Pinger {
    address: IpAddr,
    own: IpAddr,
    ident: u16,
    sequence: u16,
    sender: Socket,
    listener: Socket,
}

impl Pinger {
    fn new(address: IpAddr, number: u16) -> io::Result<Self> {
        let protocol = if address.is_ipv4() { ICMP } else { ICMPV6 };
        Ok(Self {
            address,
            own: packet::own_address(address)?,
            ident: (std::process::id() as u16).wrapping_mul(31).wrapping_add(number),
            sequence: 0,
            sender: packet::sender(address.is_ipv4())?,
            listener: packet::listener(address.is_ipv4(), protocol)?,
        })
    }

    fn try_size(&mut self, size: u16) -> io::Result<Outcome> {
        let is_ipv4 = self.address.is_ipv4();
        for _ in 0..TRIES {
            self.sequence = self.sequence.wrapping_add(1);
            let (ident, sequence) = (self.ident.to_be_bytes(), self.sequence.to_be_bytes());
            let (protocol, kind, header) = if is_ipv4 { (ICMP, 8, 20) } else { (ICMPV6, 128, 40) };
            let mut echo = vec![kind, 0, 0, 0, ident[0], ident[1], sequence[0], sequence[1]];
            echo.resize(usize::from(size).saturating_sub(header).max(8), 0);
            packet::finish(&mut echo, 2, protocol, self.own, self.address);
            let whole = packet::ip(protocol, self.own, self.address, &echo);
            if !packet::send(&self.sender, &whole, self.address)? {
                return Ok(Outcome::TooBig(None));
            }
            let heard = packet::hear(&self.listener, is_ipv4, PATIENCE, |_, icmp| {
                if is_ipv4 { heard_v4(icmp, &echo[4..8]) } else { heard_v6(icmp, &echo[4..8]) }
            })?;
            if let Some(outcome) = heard {
                return Ok(outcome);
            }
        }
        Ok(Outcome::Lost)
    }
}

/// What an ICMP message says of the echo request with these words of ident and sequence.
fn heard_v4(icmp: &[u8], echo: &[u8]) -> Option<Outcome> {
    match icmp.get(..2)? {
        [0, 0] if icmp.get(4..8)? == echo => Some(Outcome::Arrived),
        [3, 4] => {
            let quote = icmp.get(8..)?;
            let header = usize::from(quote.first()? & 15) * 4;
            let is_ours = quote.get(header + 4..header + 8)? == echo;
            let mtu = u16::from_be_bytes([icmp[6], icmp[7]]);
            is_ours.then_some(Outcome::TooBig((mtu != 0).then_some(mtu)))
        }
        _ => None,
    }
}

/// The same for ICMPv6.
fn heard_v6(icmp: &[u8], echo: &[u8]) -> Option<Outcome> {
    match icmp.first()? {
        129 if icmp.get(4..8)? == echo => Some(Outcome::Arrived),
        2 => {
            let is_ours = icmp.get(8 + 40 + 4..8 + 40 + 8)? == echo;
            let mtu = u32::from_be_bytes(icmp.get(4..8)?.try_into().ok()?);
            is_ours.then_some(Outcome::TooBig(u16::try_from(mtu).ok()))
        }
        _ => None,
    }
}

/// What to say of a path.
pub fn finding(address: IpAddr, path: Path) -> Finding {
    let about = format!("path to {address}");
    match path {
        Path::Takes(mtu) => Finding::ok(about, format!("takes packets of {mtu} bytes")),
        Path::Silent => Finding::warn(
            about,
            "not measured: pings are not answered",
            "let the worker answer pings of this host (its firewall, net.ipv4.icmp_echo_ignore_all), or measure by hand",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path that takes `mtu`, and whose routers say so or are silent.
    fn over(mtu: u16, tells: bool, link: u16) -> (Path, usize) {
        let mut count = 0;
        let path = search(576, link, |size| {
            count += 1;
            Ok(match size <= mtu {
                true => Outcome::Arrived,
                false if tells => Outcome::TooBig(Some(mtu)),
                false => Outcome::Lost,
            })
        });
        (path.expect("nothing fails here"), count)
    }

    #[test]
    fn every_mtu_is_found_to_the_byte() {
        for mtu in (576..=1_500).chain([9_000]) {
            for tells in [false, true] {
                let (path, count) = over(mtu, tells, 9_000);
                assert_eq!(path, Path::Takes(mtu), "tells: {tells}");
                assert!(count <= 17, "{mtu} (tells: {tells}) took {count}");
            }
        }
        assert_eq!(over(1_500, false, 1_500), (Path::Takes(1_500), 1));
        assert!(over(1_400, true, 1_500).1 <= 4, "a router's word saves the search");
    }

    #[test]
    fn a_router_that_lies_misleads_nobody() {
        let path = search(576, 1_500, |size| {
            Ok(if size <= 1_400 { Outcome::Arrived } else { Outcome::TooBig(Some(600)) })
        });
        assert_eq!(path.expect("nothing fails here"), Path::Takes(1_400));
    }

    #[test]
    fn who_answers_nothing_is_silent() {
        assert_eq!(search(576, 1_500, |_| Ok(Outcome::Lost)).expect("nothing fails here"), Path::Silent);
    }
}
