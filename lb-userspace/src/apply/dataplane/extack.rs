//! Reads the driver's message about a refused XDP program. A BPF link returns an error number only, so the attempt is
//! repeated by netlink, whose answers carry text (extended acknowledgements, "extack").

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

const RTM_SETLINK: u16 = 19;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
/// The answer has attributes.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The answer does not repeat the request.
const NLM_F_CAPPED: u16 = 0x100;
const NLMSG_ERROR: u16 = 2;
const NLMSGERR_ATTR_MSG: u16 = 1;
const NLA_F_NESTED: u16 = 1 << 15;
const IFLA_XDP: u16 = 43;
const IFLA_XDP_FD: u16 = 1;
const IFLA_XDP_FLAGS: u16 = 3;
/// Attach only where no program is attached.
const XDP_FLAGS_UPDATE_IF_NOEXIST: u32 = 1;
const SOL_NETLINK: libc::c_int = 270;
const NETLINK_CAP_ACK: libc::c_int = 10;
const NETLINK_EXT_ACK: libc::c_int = 11;
/// Length of a message's header.
pub const HEADER: usize = 16;
/// Longest answer: that to a question about an interface with all its attributes, except statistics.
const ANSWER: usize = 65_536;

/// Returns the driver's message about attaching a program after a link has just failed with the same flags (`mode`);
/// none if there is no message. If the attempt succeeds this time, it is undone at once.
pub fn reason(program: &impl AsFd, ifindex: u32, mode: u32) -> Option<String> {
    let socket = open().ok()?;
    let fd = program.as_fd().as_raw_fd();
    let answer = ask(&socket, &request(ifindex, fd, mode | XDP_FLAGS_UPDATE_IF_NOEXIST)).ok()?;
    if error_of(&answer) == Some(0) {
        // The driver accepted it: detach, because the caller expects an interface without a program.
        let _ = ask(&socket, &request(ifindex, -1, mode));
    }
    sentence(&answer)
}

/// Opens a socket for requests about interfaces.
pub fn open() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no address is passed.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just given us this descriptor.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    for option in [NETLINK_CAP_ACK, NETLINK_EXT_ACK] {
        let on: libc::c_int = 1;
        let len = size_of_val(&on) as libc::socklen_t;
        // SAFETY: the value has the given length.
        if unsafe { libc::setsockopt(fd, SOL_NETLINK, option, (&raw const on).cast(), len) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(socket)
}

fn request(ifindex: u32, program: i32, flags: u32) -> Vec<u8> {
    let mut nested = Vec::new();
    for (kind, value) in [(IFLA_XDP_FD, program.to_ne_bytes()), (IFLA_XDP_FLAGS, flags.to_ne_bytes())] {
        nested.extend(8u16.to_ne_bytes());
        nested.extend(kind.to_ne_bytes());
        nested.extend(value);
    }
    // struct ifinfomsg: family, pad, type, index, flags, change.
    let mut body = vec![0u8; 16];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    body.extend((nested.len() as u16 + 4).to_ne_bytes());
    body.extend((IFLA_XDP | NLA_F_NESTED).to_ne_bytes());
    body.extend(nested);
    let mut message = Vec::new();
    message.extend(((HEADER + body.len()) as u32).to_ne_bytes());
    message.extend(RTM_SETLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// Sends a request and returns the answer.
pub fn ask(socket: &OwnedFd, request: &[u8]) -> io::Result<Vec<u8>> {
    let fd = socket.as_raw_fd();
    // SAFETY: the buffer has the given length.
    if unsafe { libc::send(fd, request.as_ptr().cast(), request.len(), 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut answer = vec![0u8; ANSWER];
    // SAFETY: the buffer has the given length.
    let len = unsafe { libc::recv(fd, answer.as_mut_ptr().cast(), answer.len(), libc::MSG_TRUNC) };
    if len < 0 {
        return Err(io::Error::last_os_error());
    }
    let len = len.cast_unsigned();
    if len > answer.len() {
        let text = format!("the kernel's answer of {len} bytes is longer than {ANSWER}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    answer.truncate(len);
    Ok(answer)
}

/// Reads 16 bits.
pub fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// Error number of an answer: 0 for success.
pub fn error_of(answer: &[u8]) -> Option<i32> {
    if half(answer, 4)? != NLMSG_ERROR {
        return None;
    }
    Some(i32::from_ne_bytes(answer.get(HEADER..HEADER + 4)?.try_into().ok()?))
}

/// Text of an answer.
fn sentence(answer: &[u8]) -> Option<String> {
    error_of(answer)?;
    let flags = half(answer, 6)?;
    if flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    // The error, then the header of the request or all of it, then attributes.
    let quoted = HEADER + 4;
    let mut at = quoted + HEADER;
    if flags & NLM_F_CAPPED == 0 {
        let len = u32::from_ne_bytes(answer.get(quoted..quoted + 4)?.try_into().ok()?) as usize;
        at = quoted + len.next_multiple_of(4);
    }
    while let (Some(len), Some(kind)) = (half(answer, at), half(answer, at + 2)) {
        let len = usize::from(len);
        if len < 4 {
            return None;
        }
        if kind == NLMSGERR_ATTR_MSG {
            let text = answer.get(at + 4..at + len)?;
            let text = String::from_utf8_lossy(text).trim_end_matches('\0').trim().to_owned();
            return (!text.is_empty()).then_some(text);
        }
        at += len.next_multiple_of(4);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(flags: u16, error: i32, quoted: &[u8], text: &str) -> Vec<u8> {
        let mut bytes = vec![0; 4];
        bytes.extend(NLMSG_ERROR.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(error.to_ne_bytes());
        bytes.extend(quoted);
        bytes.extend((text.len() as u16 + 5).to_ne_bytes());
        bytes.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
        bytes.extend(text.bytes());
        bytes.push(0);
        bytes
    }

    #[test]
    fn the_sentence_is_found_behind_the_request() {
        let whole = request(3, 7, 4);
        let text = "the MTU is too large";
        let capped = answer(NLM_F_ACK_TLVS | NLM_F_CAPPED, -22, &whole[..HEADER], text);
        assert_eq!(sentence(&capped).as_deref(), Some(text));
        let full = answer(NLM_F_ACK_TLVS, -22, &whole, text);
        assert_eq!(sentence(&full).as_deref(), Some(text));
        assert_eq!(error_of(&full), Some(-22));
        assert_eq!(sentence(&answer(0, -22, &whole, "")), None, "no attributes");
        assert_eq!(sentence(&capped[..20]), None, "truncated");
        assert_eq!(sentence(&[]), None);
    }

    #[test]
    fn a_request_says_how_long_it_is() {
        let request = request(3, -1, 4);
        assert_eq!(request.len(), HEADER + 16 + 4 + 16);
        assert_eq!(request[..4], (request.len() as u32).to_ne_bytes());
    }
}
