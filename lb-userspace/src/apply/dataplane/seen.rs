//! What the kernel says of an interface, read by netlink: its name, whether it can carry packets, and the XDP programs on
//! it. A BPF link alone does not tell: it keeps the interface's index when the interface moves to another network
//! namespace.

use super::extack::{HEADER, ask, error_of, half, open};
use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

const RTM_GETLINK: u16 = 18;
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_EXT_MASK: u16 = 29;
const IFLA_XDP: u16 = 43;
/// `IFLA_XDP_PROG_ID`, and those of the driver, of generic mode, and of the hardware.
const IFLA_XDP_PROGRAMS: std::ops::RangeInclusive<u16> = 4..=7;
/// `RTEXT_FILTER_SKIP_STATS`.
const SKIP_STATISTICS: u32 = 1 << 3;
/// Length of `struct ifinfomsg`.
const INFO: usize = 16;
const NESTED: u16 = 1 << 15;

/// An interface of this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenInterface {
    /// Index.
    pub ifindex: u32,
    /// Name.
    pub name: String,
    /// Whether an administrator has set it up.
    pub is_up: bool,
    /// Whether it has a carrier; only meaningful while it is up.
    pub has_carrier: bool,
    /// Ids of the XDP programs on it.
    pub programs: BTreeSet<u32>,
}

/// Socket for questions.
#[derive(Debug)]
pub struct Questions(OwnedFd);

impl Questions {
    /// Opens the socket.
    pub fn open() -> io::Result<Self> {
        open().map(Self)
    }

    /// Returns the interface with this name; none if there is none.
    pub fn by_name(&self, name: &str) -> io::Result<Option<SeenInterface>> {
        let mut attribute = name.as_bytes().to_vec();
        attribute.push(0);
        if attribute.len() > libc::IFNAMSIZ {
            return Ok(None);
        }
        self.ask(&request(0, Some(&attribute)))
    }

    /// Returns the interface with this index; none if there is none.
    pub fn by_index(&self, ifindex: u32) -> io::Result<Option<SeenInterface>> {
        self.ask(&request(ifindex, None))
    }

    fn ask(&self, request: &[u8]) -> io::Result<Option<SeenInterface>> {
        // An answer that was left behind by an interrupted question would be taken for the answer to this one.
        drain(&self.0);
        let answer = ask(&self.0, request)?;
        match error_of(&answer) {
            Some(error) if -error == libc::ENODEV => Ok(None),
            Some(error) => Err(io::Error::from_raw_os_error(-error)),
            None => parse(&answer).map(Some).ok_or_else(|| io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Names of the interfaces that XDP programs run on, whosever they are.
pub fn interfaces_with_programs() -> Vec<String> {
    let (Ok(questions), Ok(all)) = (Questions::open(), nix::net::if_::if_nameindex()) else {
        return Vec::new();
    };
    let seen = all.iter().filter_map(|i| questions.by_index(i.index()).ok()?);
    seen.filter(|seen| !seen.programs.is_empty()).map(|seen| seen.name).collect()
}

fn drain(socket: &OwnedFd) {
    let mut buffer = [0u8; 16];
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: the buffer has the given length.
    while unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) } >= 0 {}
}

fn push(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    message.extend((value.len() as u16 + 4).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

fn request(ifindex: u32, name: Option<&[u8]>) -> Vec<u8> {
    let mut body = vec![0u8; INFO];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    push(&mut body, IFLA_EXT_MASK, &SKIP_STATISTICS.to_ne_bytes());
    if let Some(name) = name {
        push(&mut body, IFLA_IFNAME, name);
    }
    let mut message = Vec::new();
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(RTM_GETLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// Splits a list of attributes into kinds and values.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (len, kind) = (usize::from(half(bytes, 0)?), half(bytes, 2)?);
        let value = bytes.get(4..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & !NESTED, value))
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn parse(answer: &[u8]) -> Option<SeenInterface> {
    if half(answer, 4)? != RTM_NEWLINK {
        return None;
    }
    let flags = word(answer, HEADER + 8)? as i32;
    let mut seen = SeenInterface {
        ifindex: word(answer, HEADER + 4)?,
        is_up: flags & libc::IFF_UP != 0,
        has_carrier: flags & libc::IFF_RUNNING != 0,
        ..SeenInterface::default()
    };
    for (kind, value) in attributes(answer.get(HEADER + INFO..)?) {
        match kind {
            IFLA_IFNAME => seen.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
            IFLA_XDP => {
                let programs = attributes(value).filter(|(kind, _)| IFLA_XDP_PROGRAMS.contains(kind));
                seen.programs = programs.filter_map(|(_, id)| word(id, 0)).filter(|id| *id != 0).collect();
            }
            _ => {}
        }
    }
    (!seen.name.is_empty()).then_some(seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_seen_by_name_and_by_index() {
        let questions = Questions::open().expect("a socket");
        let by_name = questions.by_name("lo").expect("an answer").expect("every namespace has one");
        assert_eq!((by_name.ifindex, by_name.name.as_str()), (1, "lo"));
        assert_eq!(questions.by_index(1).expect("an answer"), Some(by_name));
        assert_eq!(questions.by_name("no-such-one").expect("an answer"), None);
        assert_eq!(questions.by_name("a-name-that-is-too-long").expect("no question"), None);
        assert_eq!(questions.by_index(0x7fff_ffff).expect("an answer"), None);
    }

    #[test]
    fn programs_are_found_in_a_nested_attribute() {
        let mut answer = request(7, Some(b"eth0\0"));
        answer[4..6].copy_from_slice(&RTM_NEWLINK.to_ne_bytes());
        answer[HEADER + 8..HEADER + 12].copy_from_slice(&1u32.to_ne_bytes());
        let mut nested = Vec::new();
        push(&mut nested, 2, &[1]);
        push(&mut nested, 4, &41u32.to_ne_bytes());
        push(&mut nested, 5, &41u32.to_ne_bytes());
        push(&mut nested, 7, &42u32.to_ne_bytes());
        push(&mut answer, IFLA_XDP | NESTED, &nested);
        let seen = parse(&answer).expect("it is complete");
        assert_eq!(
            (seen.ifindex, seen.name.as_str(), seen.is_up, seen.has_carrier),
            (7, "eth0", true, false)
        );
        assert_eq!(seen.programs, [41, 42].into());
        for end in 0..answer.len() {
            // A truncated answer is no reason to panic.
            let _ = parse(&answer[..end]);
        }
    }
}
