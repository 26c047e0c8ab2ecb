//! Reads a whole hash map in batches (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6): a flow table of a million
//! entries in some hundred system calls instead of two million.

use super::DataplaneError;
use aya::maps::MapData;
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};
use zerocopy::FromBytes;

const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
/// Entries asked for at once. A bucket is never split, so it must hold the largest.
const BATCH: usize = 4_096;

/// The part of `union bpf_attr` for batches.
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// Calls `each` with every entry. Entries that come or go meanwhile may or may not be among them.
pub fn for_each<K, V>(
    map: &MapData,
    name: &'static str,
    mut each: impl FnMut(K, V),
) -> Result<(), DataplaneError>
where
    K: FromBytes + Copy,
    V: FromBytes + Copy,
{
    let mut keys = vec![K::new_zeroed(); BATCH];
    let mut values = vec![V::new_zeroed(); BATCH];
    // The kernel's cursor is a bucket number for hash maps.
    let (mut cursor, mut next) = (0u64, 0u64);
    let mut first = true;
    loop {
        let mut attr = BatchAttr {
            in_batch: if first { 0 } else { &raw mut cursor as u64 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: BATCH as u32,
            map_fd: map.fd().as_fd().as_raw_fd() as u32,
            ..BatchAttr::default()
        };
        // SAFETY: the attribute and the buffers it names are ours and as large as `count` says, and
        // any bytes are valid keys and values.
        let answer = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_MAP_LOOKUP_BATCH, &raw mut attr, size_of::<BatchAttr>())
        };
        let error = io::Error::last_os_error();
        let done = answer < 0 && error.raw_os_error() == Some(libc::ENOENT);
        if answer < 0 && !done {
            return Err(DataplaneError::Read { map: name, source: error });
        }
        for (key, value) in keys.iter().zip(&values).take(attr.count as usize) {
            each(*key, *value);
        }
        if done {
            return Ok(());
        }
        (cursor, first) = (next, false);
    }
}

/// Deletes an entry; one that is not there is as good.
pub fn delete<K: zerocopy::IntoBytes + zerocopy::Immutable>(map: &MapData, key: &K) -> io::Result<()> {
    const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
    #[repr(C)]
    struct DeleteAttr {
        map_fd: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let bytes = key.as_bytes();
    let map_fd = map.fd().as_fd().as_raw_fd() as u32;
    let attr = DeleteAttr { map_fd, pad: 0, key: bytes.as_ptr() as u64, value: 0, flags: 0 };
    // SAFETY: a valid attribute of its size; the key is as long as the map's keys and lives until
    // the call returns.
    let answer = unsafe {
        libc::syscall(libc::SYS_bpf, BPF_MAP_DELETE_ELEM, &raw const attr, size_of::<DeleteAttr>())
    };
    let error = io::Error::last_os_error();
    if answer == 0 || error.raw_os_error() == Some(libc::ENOENT) { Ok(()) } else { Err(error) }
}
