//! Two programs small enough to be written in the kernel's instruction format,
//! so that the bed needs no BPF tool chain: XDP_PASS, and a VLAN tagger.
//!
//! A veth end delivers frames sent by XDP_TX only when it has an XDP program of
//! its own; without one they are lost, and the sender counts them as sent.

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result};

use crate::netns::Namespace;

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
pub(crate) const BPF_PROG_TYPE_XDP: u32 = 6;
pub(crate) const BPF_XDP: u32 = 37;
const BPF_TCX_EGRESS: u32 = 47;
pub(crate) const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;

/// One instruction: operation, registers (source high, destination low), offset,
/// immediate.
pub(crate) const fn instruction(operation: u8, registers: u8, offset: u16, immediate: u32) -> u64 {
    operation as u64 | (registers as u64) << 8 | (offset as u64) << 16 | (immediate as u64) << 32
}

const MOVE: u8 = 0xb7;
const LOAD_WORD: u8 = 0x61;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_IF_NOT: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// `return XDP_PASS`.
const PASS: [u64; 2] = [instruction(MOVE, 0, 0, 2), instruction(EXIT, 0, 0, 0)];

/// `return XDP_DROP`.
const DROP: [u64; 2] = [instruction(MOVE, 0, 0, 1), instruction(EXIT, 0, 0, 0)];

const PROTOCOL_OFFSET: u16 = 16; // __sk_buff.protocol
const SKB_VLAN_PUSH: u32 = 18;

/// Pushes an 802.1Q tag on IPv4 and IPv6 packets, and lets everything pass.
const fn tagger(vlan: u16) -> [u64; 8] {
    [
        instruction(LOAD_WORD, 0x12, PROTOCOL_OFFSET, 0),
        instruction(JUMP_IF_EQUAL, 0x02, 1, 0x0800u16.to_be() as u32),
        instruction(JUMP_IF_NOT, 0x02, 3, 0x86ddu16.to_be() as u32),
        instruction(MOVE, 0x02, 0, 0x8100u16.to_be() as u32),
        instruction(MOVE, 0x03, 0, vlan as u32),
        instruction(CALL, 0, 0, SKB_VLAN_PUSH),
        instruction(MOVE, 0, 0, 0),
        instruction(EXIT, 0, 0, 0),
    ]
}

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

/// Attaches XDP_PASS to `interface`. It goes when the result is dropped.
pub fn attach_pass(namespace: &Namespace, interface: &str) -> Result<OwnedFd> {
    attach(namespace, interface, &PASS, (BPF_PROG_TYPE_XDP, BPF_XDP, BPF_F_XDP_HAS_FRAGS))
        .with_context(|| format!("cannot attach XDP_PASS to {interface} in {}", namespace.name()))
}

/// Loses everything that `interface` receives, without a word to either end, until the result is dropped.
pub fn attach_drop(namespace: &Namespace, interface: &str) -> Result<OwnedFd> {
    attach(namespace, interface, &DROP, (BPF_PROG_TYPE_XDP, BPF_XDP, BPF_F_XDP_HAS_FRAGS))
        .with_context(|| format!("cannot attach XDP_DROP to {interface} in {}", namespace.name()))
}

/// Lets IP packets leave `interface` with an 802.1Q tag, on kernels (6.6 on)
/// that have tcx. No VLAN device is needed. It goes when the result is dropped.
pub fn attach_tagger(namespace: &Namespace, interface: &str, vlan: u16) -> Result<OwnedFd> {
    // Else the tag travels beside the frame, where an XDP program cannot see it.
    namespace.run("ethtool", &["-K", interface, "txvlan", "off"])?;
    attach(namespace, interface, &tagger(vlan), (BPF_PROG_TYPE_SCHED_CLS, BPF_TCX_EGRESS, 0))
        .with_context(|| format!("cannot attach a VLAN tagger to {interface} in {}", namespace.name()))
}

fn open_pin(pin: &Path) -> Result<OwnedFd> {
    #[repr(C)]
    struct Get {
        path: u64,
        descriptor: u32,
        flags: u32,
    }
    let path = CString::new(pin.as_os_str().as_encoded_bytes())?;
    bpf(BPF_OBJ_GET, &Get { path: path.as_ptr() as u64, descriptor: 0, flags: 0 })
        .with_context(|| format!("cannot open {}", pin.display()))
}

/// Puts XDP_PASS in the place of the program under a pinned link, as `bpftool link update` does.
pub fn replace_by_pass(pin: &Path) -> Result<()> {
    #[repr(C)]
    struct Update {
        link: u32,
        program: u32,
        flags: u32,
        old: u32,
    }
    let link = open_pin(pin)?;
    // The new program must have the same flags as the one under the link, which has no frags at usual MTUs.
    let program = load(&PASS, (BPF_PROG_TYPE_XDP, BPF_XDP, 0))?;
    let (link, program) = (link.as_raw_fd().cast_unsigned(), program.as_raw_fd().cast_unsigned());
    call(BPF_LINK_UPDATE, &Update { link, program, flags: 0, old: 0 })
        .map(drop)
        .with_context(|| format!("cannot replace the program under {}", pin.display()))
}

/// Detaches a pinned link from its interface, as `bpftool link detach` does.
pub fn detach_link(pin: &Path) -> Result<()> {
    let link = open_pin(pin)?;
    call(BPF_LINK_DETACH, &link.as_raw_fd().cast_unsigned())
        .map(drop)
        .with_context(|| format!("cannot detach {}", pin.display()))
}

/// `kind` is the program's type, its place of attachment, its load flags.
fn attach(namespace: &Namespace, interface: &str, program: &[u64], kind: (u32, u32, u32)) -> Result<OwnedFd> {
    let index = namespace.index(interface)?;
    let program = program.to_owned();
    let attached = namespace.enter(move || {
        let program = load(&program, kind)?;
        let program = program.as_raw_fd().cast_unsigned();
        bpf(BPF_LINK_CREATE, &LinkAttributes { program, interface: index, attach_type: kind.1, flags: 0 })
    })?;
    Ok(attached?)
}

/// Loads a program of this type, place of attachment, and load flags.
pub(crate) fn load(
    program: &[u64],
    (program_type, attach_type, flags): (u32, u32, u32),
) -> io::Result<OwnedFd> {
    let license = c"GPL";
    let mut name = [0; 16];
    name[..8].copy_from_slice(b"lb_test\0");
    let attributes = LoadAttributes {
        program_type,
        instruction_count: u32::try_from(program.len()).expect("the programs are short"),
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        flags,
        name,
        attach_type,
        ..LoadAttributes::default()
    };
    bpf(BPF_PROG_LOAD, &attributes)
}

/// A call of bpf(2) that answers a descriptor.
pub(crate) fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    let result = call(command, attributes)?;
    let descriptor = i32::try_from(result).expect("the kernel numbers descriptors in an int");
    // SAFETY: the kernel has just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// A call of bpf(2).
pub(crate) fn call<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is laid out as the kernel's union begins, its size is
    // passed along, and the memory it points to lives through the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
