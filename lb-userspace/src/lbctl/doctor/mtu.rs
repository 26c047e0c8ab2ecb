//! Measures the path MTU to a worker: a binary search with pings that must not be fragmented, between the minimum MTU of
//! every path and the MTU of the first link. A router's ICMP error suggests the next size to try; the search also
//! succeeds if routers are silent (a black hole).

use super::{
    Finding,
    packet::{self, ICMP, ICMPV6},
};
use socket2::Socket;
use std::{collections::BTreeMap, io, net::IpAddr, time::Duration};

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_millis(300);
/// Pings per size.
const TRIES: u16 = 2;
/// Workers measured concurrently.
const CONCURRENCY: usize = 32;

/// The result of measuring a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// The path carries IP packets of up to this many bytes.
    Takes(u16),
    /// Not even small pings are answered.
    Silent,
}

/// Packet size that every path must carry (RFC 791: hosts accept 576; RFC 8200).
fn minimum_mtu(address: IpAddr) -> u16 {
    if address.is_ipv4() { 576 } else { 1_280 }
}

/// Measures the paths to these addresses, given the MTU of their first links.
pub fn measure(targets: &BTreeMap<IpAddr, u16>) -> io::Result<BTreeMap<IpAddr, Path>> {
    let all: Vec<(IpAddr, u16)> = targets.iter().map(|(address, mtu)| (*address, *mtu)).collect();
    let mut paths = BTreeMap::new();
    for some in all.chunks(CONCURRENCY) {
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
                // For example no route, which another check reports.
                Err(_) => drop(paths.insert(address, Path::Silent)),
            }
        }
    }
    Ok(paths)
}

/// The result of trying one size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SizeOutcome {
    Arrived,
    /// A router or this host refuses the size, and may say which size fits.
    TooBig(Option<u16>),
    Lost,
}

fn path(address: IpAddr, link_mtu: u16, number: u16) -> io::Result<Path> {
    let mut pinger = Pinger::new(address, number)?;
    search(minimum_mtu(address), link_mtu, |size| pinger.try_size(size))
}

/// Finds the largest size that arrives.
fn search(
    least: u16,
    most: u16,
    mut attempt: impl FnMut(u16) -> io::Result<SizeOutcome>,
) -> io::Result<Path> {
    let most = most.max(least);
    // A size that a router suggested and that is still to be tried.
    let mut suggested = match attempt(most)? {
        SizeOutcome::Arrived => return Ok(Path::Takes(most)),
        SizeOutcome::TooBig(size) => size,
        SizeOutcome::Lost => None,
    };
    if attempt(least)? != SizeOutcome::Arrived {
        return Ok(Path::Silent);
    }
    let (mut fits, mut too_big) = (least, most);
    while too_big - fits > 1 {
        let suggestion = suggested.take().filter(|size| (fits + 1..too_big).contains(size));
        let size = suggestion.unwrap_or(fits + (too_big - fits) / 2);
        match attempt(size)? {
            SizeOutcome::Arrived => {
                fits = size;
                // If the suggestion is exact, one more byte does not fit.
                suggested = suggestion.map(|size| size + 1);
            }
            outcome => {
                too_big = size;
                suggested = if let SizeOutcome::TooBig(size) = outcome { size } else { None };
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

    fn try_size(&mut self, size: u16) -> io::Result<SizeOutcome> {
        let is_ipv4 = self.address.is_ipv4();
        for _ in 0..TRIES {
            self.sequence = self.sequence.wrapping_add(1);
            let (ident, sequence) = (self.ident.to_be_bytes(), self.sequence.to_be_bytes());
            let (protocol, kind, header) = if is_ipv4 { (ICMP, 8, 20) } else { (ICMPV6, 128, 40) };
            let mut echo = vec![kind, 0, 0, 0, ident[0], ident[1], sequence[0], sequence[1]];
            echo.resize(usize::from(size).saturating_sub(header).max(8), 0);
            packet::write_checksum(&mut echo, 2, protocol, self.own, self.address);
            let whole = packet::ip(protocol, self.own, self.address, &echo);
            if !packet::send(&self.sender, &whole, self.address)? {
                return Ok(SizeOutcome::TooBig(None));
            }
            let reply = packet::receive(&self.listener, is_ipv4, PATIENCE, |_, icmp| {
                if is_ipv4 { parse_icmp(icmp, &echo[4..8]) } else { parse_icmpv6(icmp, &echo[4..8]) }
            })?;
            if let Some(outcome) = reply {
                return Ok(outcome);
            }
        }
        Ok(SizeOutcome::Lost)
    }
}

/// Parses an ICMP message about the echo request with this identifier and sequence number.
fn parse_icmp(icmp: &[u8], echo: &[u8]) -> Option<SizeOutcome> {
    match icmp.get(..2)? {
        [0, 0] if icmp.get(4..8)? == echo => Some(SizeOutcome::Arrived),
        [3, 4] => {
            let quote = icmp.get(8..)?;
            let header = usize::from(quote.first()? & 15) * 4;
            let is_ours = quote.get(header + 4..header + 8)? == echo;
            let mtu = u16::from_be_bytes([icmp[6], icmp[7]]);
            is_ours.then_some(SizeOutcome::TooBig((mtu != 0).then_some(mtu)))
        }
        _ => None,
    }
}

/// Parses an ICMPv6 message about the echo request with this identifier and sequence number.
fn parse_icmpv6(icmp: &[u8], echo: &[u8]) -> Option<SizeOutcome> {
    match icmp.first()? {
        129 if icmp.get(4..8)? == echo => Some(SizeOutcome::Arrived),
        2 => {
            let is_ours = icmp.get(8 + 40 + 4..8 + 40 + 8)? == echo;
            let mtu = u32::from_be_bytes(icmp.get(4..8)?.try_into().ok()?);
            is_ours.then_some(SizeOutcome::TooBig(u16::try_from(mtu).ok()))
        }
        _ => None,
    }
}

/// Reports a measured path.
pub fn finding(address: IpAddr, path: Path) -> Finding {
    let about = format!("path to {address}");
    match path {
        Path::Takes(mtu) => Finding::ok(about, format!("carries packets of up to {mtu} bytes")),
        Path::Silent => Finding::warn(
            about,
            "not measured: pings are not answered",
            "allow pings from this host on the worker (firewall, net.ipv4.icmp_echo_ignore_all), or measure by hand",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches a path of MTU `mtu`, whose routers report it or are silent.
    fn search_over(mtu: u16, reports: bool, link: u16) -> (Path, usize) {
        let mut count = 0;
        let path = search(576, link, |size| {
            count += 1;
            Ok(match size <= mtu {
                true => SizeOutcome::Arrived,
                false if reports => SizeOutcome::TooBig(Some(mtu)),
                false => SizeOutcome::Lost,
            })
        });
        (path.expect("nothing fails here"), count)
    }

    #[test]
    fn every_mtu_is_found_to_the_byte() {
        for mtu in (576..=1_500).chain([9_000]) {
            for reports in [false, true] {
                let (path, count) = search_over(mtu, reports, 9_000);
                assert_eq!(path, Path::Takes(mtu), "reports: {reports}");
                assert!(count <= 17, "{mtu} (reports: {reports}) took {count}");
            }
        }
        assert_eq!(search_over(1_500, false, 1_500), (Path::Takes(1_500), 1));
        assert!(search_over(1_400, true, 1_500).1 <= 4, "a router's report shortens the search");
    }

    #[test]
    fn a_router_that_lies_misleads_nobody() {
        let path = search(576, 1_500, |size| {
            Ok(if size <= 1_400 { SizeOutcome::Arrived } else { SizeOutcome::TooBig(Some(600)) })
        });
        assert_eq!(path.expect("nothing fails here"), Path::Takes(1_400));
    }

    #[test]
    fn who_answers_nothing_is_silent() {
        assert_eq!(search(576, 1_500, |_| Ok(SizeOutcome::Lost)).expect("nothing fails here"), Path::Silent);
    }
}
