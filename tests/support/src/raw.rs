//! Frames sent as they are, whatever is in them.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};

use crate::netns::Namespace;

/// Sends frames out of `interface` of a namespace, one after the other, `pause` apart.
pub fn send(namespace: &Namespace, interface: &str, frames: Vec<Vec<u8>>, pause: Duration) -> Result<()> {
    let ifindex = namespace.index(interface)?;
    namespace.enter(move || send_here(ifindex, &frames, pause))?
}

fn send_here(ifindex: u32, frames: &[Vec<u8>], pause: Duration) -> Result<()> {
    // SAFETY: plain numbers; the result is checked below.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    ensure!(fd >= 0, "cannot open a packet socket: {}", io::Error::last_os_error());
    // SAFETY: opened a moment ago, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: integers and an array of them, for which zero is a value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_ifindex = i32::try_from(ifindex).context("interface numbers are small")?;
    for frame in frames {
        // SAFETY: both point to memory of the lengths given, which lives through the call.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            )
        };
        ensure!(
            sent == frame.len() as isize,
            "a frame of {} bytes was not sent: {}",
            frame.len(),
            io::Error::last_os_error()
        );
        thread::sleep(pause);
    }
    Ok(())
}
