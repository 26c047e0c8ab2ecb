//! Reads a whole map in batches (`BPF_MAP_LOOKUP_BATCH`, Linux 5.6): a flow table of a million
//! entries in some hundred system calls instead of two million.

use super::{DataplaneError, sys};
use aya::maps::MapData;
use std::{io, os::fd::AsFd};
use zerocopy::FromBytes;

/// Entries per call. The kernel never splits a bucket, so this must hold the largest bucket.
const BATCH: usize = 4_096;

/// Calls `each` with every entry. Entries added or removed meanwhile may or may not be included.
pub fn for_each<K, V>(
    map: &MapData,
    name: &'static str,
    mut each: impl FnMut(K, V),
) -> Result<(), DataplaneError>
where
    K: FromBytes + Copy,
    V: FromBytes + Copy,
{
    for_each_raw(map.fd(), size_of::<K>(), size_of::<V>(), |key, value| {
        let (key, value) = (K::read_from_bytes(key), V::read_from_bytes(value));
        if let (Ok(key), Ok(value)) = (key, value) {
            each(key, value);
        }
    })
    .map_err(|source| DataplaneError::Read { map: name, source })
}

/// Calls `each` with the bytes of every entry of a map whose keys and values have these sizes.
pub fn for_each_raw(
    map: &impl AsFd,
    key_size: usize,
    value_size: usize,
    mut each: impl FnMut(&[u8], &[u8]),
) -> io::Result<()> {
    let (mut keys, mut values) = (vec![0; BATCH * key_size], vec![0; BATCH * value_size]);
    let mut cursor = sys::Cursor::default();
    loop {
        let (count, is_last) = sys::lookup_batch(map, &mut cursor, &mut keys, &mut values, BATCH)?;
        let entries = keys.chunks_exact(key_size).zip(values.chunks_exact(value_size));
        entries.take(count).for_each(|(key, value)| each(key, value));
        if is_last {
            return Ok(());
        }
    }
}

/// Deletes an entry; succeeds if there is none.
pub fn delete<K: zerocopy::IntoBytes + zerocopy::Immutable>(map: &MapData, key: &K) -> io::Result<()> {
    sys::delete(map.fd(), key.as_bytes())
}

/// Writes entries, a million in a few hundred system calls. Entries written before a failure stay.
pub fn update<K, V>(map: &MapData, name: &'static str, entries: &[(K, V)]) -> Result<(), DataplaneError>
where
    K: zerocopy::IntoBytes + zerocopy::Immutable + Copy,
    V: zerocopy::IntoBytes + zerocopy::Immutable + Copy,
{
    for chunk in entries.chunks(BATCH) {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for (key, value) in chunk {
            keys.extend_from_slice(key.as_bytes());
            values.extend_from_slice(value.as_bytes());
        }
        sys::update_batch(map.fd(), &keys, &values, chunk.len())
            .map_err(|source| DataplaneError::Write { map: name, source })?;
    }
    Ok(())
}
