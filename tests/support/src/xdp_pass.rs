//! The smallest XDP program (`return XDP_PASS`) for the peers of a veth pair.
//!
//! A veth end delivers frames sent by XDP_TX only when it has an XDP program of
//! its own; without one they are lost, and the sender counts them as sent.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use anyhow::{Context, Result};

use crate::netns::Namespace;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;

/// `r0 = 2 (XDP_PASS); exit`, in the kernel's instruction format.
const PROGRAM: [u64; 2] = [0x0000_0002_0000_00b7, 0x0000_0000_0000_0095];

/// The head of `union bpf_attr` for BPF_PROG_LOAD (linux/bpf.h).
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

/// The head of `union bpf_attr` for BPF_LINK_CREATE.
#[repr(C)]
struct LinkAttributes {
    program: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches the program to `interface`. It goes when the result is dropped.
pub fn attach(namespace: &Namespace, interface: &str) -> Result<OwnedFd> {
    let index = namespace.index(interface)?;
    namespace
        .enter(move || load().and_then(|program| link(&program, index)))?
        .with_context(|| format!("cannot attach XDP_PASS to {interface} in {}", namespace.name()))
}

fn load() -> io::Result<OwnedFd> {
    let license = c"GPL";
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"lb_pass\0");
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_XDP,
        instruction_count: PROGRAM.len() as u32,
        instructions: PROGRAM.as_ptr() as u64,
        license: license.as_ptr() as u64,
        flags: BPF_F_XDP_HAS_FRAGS,
        name,
        attach_type: BPF_XDP,
        ..LoadAttributes::default()
    };
    bpf(BPF_PROG_LOAD, &attributes)
}

fn link(program: &OwnedFd, interface: u32) -> io::Result<OwnedFd> {
    let program = program.as_raw_fd().cast_unsigned();
    bpf(BPF_LINK_CREATE, &LinkAttributes { program, interface, attach_type: BPF_XDP, flags: 0 })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` is laid out as the kernel's union begins, its size is
    // passed along, and the memory it points to lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let descriptor = i32::try_from(result).expect("the kernel numbers descriptors in an int");
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
