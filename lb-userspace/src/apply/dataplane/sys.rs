//! Commands of bpf(2) that aya does not offer.
//!
//! Errors are the kernel's; callers add what they were doing.

use std::{
    ffi::{CStr, CString},
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
    path::Path,
};

const MAP_CREATE: libc::c_long = 0;
const MAP_LOOKUP_ELEM: libc::c_long = 1;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const PROG_LOAD: libc::c_long = 5;
const OBJ_PIN: libc::c_long = 6;
const OBJ_GET: libc::c_long = 7;
const PROG_TEST_RUN: libc::c_long = 10;
const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const MAP_LOOKUP_BATCH: libc::c_long = 24;
const MAP_UPDATE_BATCH: libc::c_long = 26;
const LINK_CREATE: libc::c_long = 28;
const LINK_UPDATE: libc::c_long = 29;

/// Flag of [`update`]: only insert, never replace.
pub const NO_EXIST: u64 = 1;

/// # Safety
/// `attr` must be the command's attribute, and the addresses in it valid for what the command does with them.
unsafe fn call<T>(command: libc::c_long, attr: &mut T) -> io::Result<i64> {
    // SAFETY: the caller vouches for the attribute; its size is its own.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, size_of::<T>()) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

#[repr(C)]
struct PathAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

/// Opens a pin.
pub fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = PathAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the path lives until the call returns.
    let fd = unsafe { call(OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Pins an object.
pub fn pin(object: &impl AsFd, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let fd = object.as_fd().as_raw_fd() as u32;
    let mut attr = PathAttr { path: path.as_ptr() as u64, fd, flags: 0 };
    // SAFETY: the path lives until the call returns.
    unsafe { call(OBJ_PIN, &mut attr) }.map(drop)
}

/// Beginning of `struct bpf_link_info` for an XDP link.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkInfo {
    kind: u32,
    id: u32,
    /// Id of the program under the link.
    pub program: u32,
    pad: u32,
    /// Index of the interface; 0 once it is gone.
    pub ifindex: u32,
    rest: [u32; 15],
}

/// Beginning of `struct bpf_prog_info`.
#[repr(C)]
#[derive(Default)]
struct ProgramInfo {
    kind: u32,
    id: u32,
    tag: [u8; 8],
    jited_len: u32,
}

fn info<T: Default>(object: &impl AsFd) -> io::Result<T> {
    #[repr(C)]
    struct Info {
        fd: u32,
        len: u32,
        info: u64,
    }
    let mut info = T::default();
    let fd = object.as_fd().as_raw_fd() as u32;
    let mut attr = Info { fd, len: size_of::<T>() as u32, info: &raw mut info as u64 };
    // SAFETY: the buffer is as long as the attribute says, and any bytes are its value: both types are integers only.
    unsafe { call(OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(info)
}

/// Reads the program and interface of a link.
pub fn link_info(link: &impl AsFd) -> io::Result<LinkInfo> {
    info(link)
}

/// Reads the id of a program.
pub fn program_id(program: &impl AsFd) -> io::Result<u32> {
    info::<ProgramInfo>(program).map(|info| info.id)
}

/// Loads a program given as instructions, to try what the kernel supports.
pub fn load_program(kind: u32, attach_type: u32, flags: u32, code: &[u64]) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Load {
        kind: u32,
        count: u32,
        code: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        ifindex: u32,
        attach_type: u32,
    }
    const LICENSE: &CStr = c"Dual MIT/GPL";
    let mut attr = Load {
        kind,
        count: code.len() as u32,
        code: code.as_ptr() as u64,
        license: LICENSE.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags,
        name: *b"lb_trial\0\0\0\0\0\0\0\0",
        ifindex: 0,
        attach_type,
    };
    // SAFETY: code and license live until the call returns.
    let fd = unsafe { call(PROG_LOAD, &mut attr) }?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Runs a program once on a packet, and returns its return value.
pub fn test_run(program: &impl AsFd, packet: &[u8]) -> io::Result<u32> {
    #[repr(C)]
    struct Run {
        program: u32,
        answer: u32,
        len_in: u32,
        len_out: u32,
        data_in: u64,
        data_out: u64,
        repeat: u32,
        duration: u32,
    }
    let mut attr = Run {
        program: program.as_fd().as_raw_fd() as u32,
        answer: 0,
        len_in: packet.len() as u32,
        len_out: 0,
        data_in: packet.as_ptr() as u64,
        data_out: 0,
        repeat: 1,
        duration: 0,
    };
    // SAFETY: the packet lives until the call returns; nothing is written but the attribute.
    unsafe { call(PROG_TEST_RUN, &mut attr) }?;
    Ok(attr.answer)
}

/// Attaches a program to an interface by a link, which detaches it when its last descriptor and pin are gone.
pub fn create_link(program: &impl AsFd, ifindex: u32, attach_type: u32, flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Create {
        program: u32,
        ifindex: u32,
        attach_type: u32,
        flags: u32,
    }
    let program = program.as_fd().as_raw_fd() as u32;
    let mut attr = Create { program, ifindex, attach_type, flags };
    // SAFETY: no address is passed.
    let fd = unsafe { call(LINK_CREATE, &mut attr) }?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether a program is compiled to machine code.
pub fn is_jitted(program: &impl AsFd) -> io::Result<bool> {
    info::<ProgramInfo>(program).map(|info| info.jited_len > 0)
}

/// Replaces the program under a link in one step: the old program runs until then.
pub fn update_link(link: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    #[repr(C)]
    struct Update {
        link: u32,
        program: u32,
        flags: u32,
        old: u32,
    }
    let (link, program) = (link.as_fd().as_raw_fd() as u32, program.as_fd().as_raw_fd() as u32);
    let mut attr = Update { link, program, flags: 0, old: 0 };
    // SAFETY: no address is passed.
    unsafe { call(LINK_UPDATE, &mut attr) }.map(drop)
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

fn element(map: &impl AsFd, key: &[u8], value: u64, flags: u64) -> ElementAttr {
    let map = map.as_fd().as_raw_fd() as u32;
    ElementAttr { map, pad: 0, key: key.as_ptr() as u64, value, flags }
}

/// Reads an entry; false if there is none. Key and value must have the map's sizes.
pub fn lookup(map: &impl AsFd, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = element(map, key, value.as_mut_ptr() as u64, 0);
    // SAFETY: both buffers live until the call returns, and have the lengths that the caller vouches for.
    match unsafe { call(MAP_LOOKUP_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes an entry; false if `flags` is [`NO_EXIST`] and there is one. Key and value must have the map's sizes.
pub fn update(map: &impl AsFd, key: &[u8], value: &[u8], flags: u64) -> io::Result<bool> {
    let mut attr = element(map, key, value.as_ptr() as u64, flags);
    // SAFETY: both buffers live until the call returns, and have the lengths that the caller vouches for; the kernel only reads.
    match unsafe { call(MAP_UPDATE_ELEM, &mut attr) } {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes an entry; succeeds if there is none. The key must have the map's size.
pub fn delete(map: &impl AsFd, key: &[u8]) -> io::Result<()> {
    let mut attr = element(map, key, 0, 0);
    // SAFETY: the key lives until the call returns, and has the length that the caller vouches for; the kernel only reads.
    match unsafe { call(MAP_DELETE_ELEM, &mut attr) } {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Memory of a map in bytes, as in `/proc`; none where the kernel does not report it.
pub fn memory(map: &impl AsFd) -> Option<u64> {
    let path = format!("/proc/self/fdinfo/{}", map.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(path).ok()?;
    info.lines().find_map(|line| line.strip_prefix("memlock:"))?.trim().parse().ok()
}

/// Beginning of the attribute of `BPF_MAP_CREATE`.
#[repr(C)]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    inner: u32,
}

fn create_map(mut attr: Create) -> io::Result<OwnedFd> {
    // SAFETY: no address is passed.
    let fd = unsafe { call(MAP_CREATE, &mut attr) }?;
    // SAFETY: the kernel has just given us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// An array of maps with one entry. Replacing the entry waits for all running programs.
pub struct MapOfMaps {
    outer: OwnedFd,
    inner: OwnedFd,
}

impl MapOfMaps {
    /// Creates both maps.
    pub fn new() -> io::Result<Self> {
        const ARRAY: u32 = 2;
        const ARRAY_OF_MAPS: u32 = 12;
        let inner = create_map(Create {
            kind: ARRAY,
            key_size: 4,
            value_size: 8,
            max_entries: 1,
            flags: 0,
            inner: 0,
        })?;
        let number = inner.as_raw_fd() as u32;
        let outer = create_map(Create {
            kind: ARRAY_OF_MAPS,
            key_size: 4,
            value_size: 4,
            max_entries: 1,
            flags: 0,
            inner: number,
        })?;
        let map = Self { outer, inner };
        map.replace()?;
        Ok(map)
    }

    /// Replaces the entry. Returns after an RCU grace period.
    pub fn replace(&self) -> io::Result<()> {
        let number = (self.inner.as_raw_fd() as u32).to_ne_bytes();
        update(&self.outer, &[0; 4], &number, 0).map(drop)
    }
}

/// Creates a program array.
pub fn program_array(entries: u32) -> io::Result<OwnedFd> {
    const PROG_ARRAY: u32 = 3;
    create_map(Create {
        kind: PROG_ARRAY,
        key_size: 4,
        value_size: 4,
        max_entries: entries,
        flags: 0,
        inner: 0,
    })
}

/// Whether [`memory`] counts the entries of maps that allocate each entry when it is inserted: tried on one.
pub fn counts_entry_memory() -> bool {
    const HASH: u32 = 1;
    const NO_PREALLOC: u32 = 1;
    let hash =
        Create { kind: HASH, key_size: 4, value_size: 8, max_entries: 8, flags: NO_PREALLOC, inner: 0 };
    let Ok(map) = create_map(hash) else { return false };
    let Some(bare) = memory(&map) else { return false };
    let is_written = update(&map, &[0; 4], &[0; 8], 0).is_ok();
    let one = memory(&map);
    is_written && one > Some(bare) && delete(&map, &[0; 4]).is_ok() && memory(&map) == Some(bare)
}

/// Position of a read of a whole map.
#[derive(Default)]
pub struct Cursor {
    /// A bucket number for hash maps, a key for arrays: 4 bytes either way.
    place: u64,
    has_begun: bool,
}

/// The part of `union bpf_attr` for batches.
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// Reads the next entries, as many as fit into the buffers (whose sizes must be whole numbers of entries): returns their
/// number, and whether they were the last.
pub fn lookup_batch(
    map: &impl AsFd,
    cursor: &mut Cursor,
    keys: &mut [u8],
    values: &mut [u8],
    count: usize,
) -> io::Result<(usize, bool)> {
    let mut next = 0u64;
    let mut attr = Batch {
        in_batch: if cursor.has_begun { &raw mut cursor.place as u64 } else { 0 },
        out_batch: &raw mut next as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: count as u32,
        map: map.as_fd().as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the buffers are ours, and hold `count` entries of the map's sizes, as the caller vouches.
    let answer = unsafe { call(MAP_LOOKUP_BATCH, &mut attr) };
    let is_last = match answer {
        Ok(_) => false,
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
        Err(error) => return Err(error),
    };
    (cursor.place, cursor.has_begun) = (next, true);
    Ok((attr.count as usize, is_last))
}

/// Writes `count` entries, whose keys and values are stored contiguously.
pub fn update_batch(map: &impl AsFd, keys: &[u8], values: &[u8], count: usize) -> io::Result<()> {
    let mut attr = Batch {
        in_batch: 0,
        out_batch: 0,
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: count as u32,
        map: map.as_fd().as_raw_fd() as u32,
        element_flags: 0,
        flags: 0,
    };
    // SAFETY: the buffers hold `count` entries of the map's sizes, as the caller vouches, and are only read.
    unsafe { call(MAP_UPDATE_BATCH, &mut attr) }.map(drop)
}
