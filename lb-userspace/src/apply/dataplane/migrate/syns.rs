//! Copies the SYN cache of another version: lines like ours, those of version 5, or the table by flow before that.

use super::{Copier, Migrated, open};
use crate::{
    apply::dataplane::{
        DataplaneError, batch,
        layout::{Conversion, Layout},
        syn_cache::{SynCache, now_tick},
        sys,
    },
    clock,
};
use lb_common::{
    Flow, FlowKey,
    flow::SYN_TIMEOUT_S,
    names,
    syn_cache::{self, CachedSyn},
};
use std::{os::fd::OwnedFd, path::Path};

/// SYN cache, in both versions.
pub(super) struct SynCachePair {
    from: SynSource,
    to: SynCache,
}

/// Form of the other version's SYN cache.
enum SynSource {
    /// Lines like ours.
    Lines(OwnedFd, Conversion),
    /// Lines of version 5.
    Version5(OwnedFd, version_5::LineFields),
    /// A table by flow, before version 5.
    Table(OwnedFd, Conversion),
}

/// The SYN cache of ABI version 5: fewer lines, and entries in another form, under the same hash.
mod version_5 {
    use super::{Layout, OwnedFd, Path, open, sys};
    use lb_common::names::NOTES;

    /// Entries per line.
    pub const WAYS: usize = 4;
    /// Number of lines.
    pub const LINES: u32 = 16_384;

    /// Offsets of the fields of a line.
    pub struct LineFields {
        pub heads: usize,
        pub sequences: usize,
        pub size: usize,
    }

    /// Opens the map; returns the key of its hashes too.
    pub fn open_map(home: &Path, layout: &Layout) -> Result<(OwnedFd, LineFields, [u64; 2]), String> {
        let sizes = layout.sizes(NOTES)?;
        let fields = LineFields {
            heads: layout.value_field(NOTES, "heads", 8 * WAYS)?,
            sequences: layout.value_field(NOTES, "sequences", 4 * WAYS)?,
            size: sizes.1,
        };
        let map = open(home, NOTES, sizes)?;
        let mut state = vec![0; sizes.1];
        let has =
            sys::lookup(&map, &LINES.to_ne_bytes(), &mut state).map_err(|e| format!("map {NOTES}: {e}"))?;
        if !has || state.len() < 16 {
            return Err(format!("map {NOTES} has no key"));
        }
        let word = |at: usize| u64::from_ne_bytes(state[at..at + 8].try_into().expect("8 bytes"));
        Ok((map, fields, [word(0), word(8)]))
    }

    /// The entries of a line: hash without the bits that select the line, second modulo 256, backend, sequence number.
    pub fn entries(line: &[u8], fields: &LineFields) -> impl Iterator<Item = (u64, u8, u32, u32)> {
        (0..WAYS).filter_map(move |way| {
            let (head, sequence) = (fields.heads + 8 * way, fields.sequences + 4 * way);
            let head = u64::from_ne_bytes(line.get(head..head + 8)?.try_into().ok()?);
            let sequence = u32::from_ne_bytes(line.get(sequence..sequence + 4)?.try_into().ok()?);
            (head != 0).then_some((head >> 32 << 32, (head >> 24) as u8, head as u32 & 0xff_ffff, sequence))
        })
    }
}

impl SynCachePair {
    /// Opens both; none if theirs cannot be read, which is recorded. Entries identify their flow only by a hash, so ours
    /// uses the same key from now on.
    pub fn open(
        (from, from_layout): (&Path, &Layout),
        (to, to_layout): (&Path, &Layout),
        migrated: &mut Migrated,
    ) -> Result<Option<Self>, DataplaneError> {
        let to = SynCache::open(to)?;
        // The copy does not update the filter; sweeps, which build it again, begin when the copy is done.
        to.disarm();
        let adopt = |key| {
            if key != to.state().key {
                to.restart(key);
            }
        };
        let has = |map| from_layout.sizes(map).is_ok();
        let opened = if has(names::SYNS) {
            Conversion::between((from_layout, names::SYNS), (to_layout, names::FLOWS)).and_then(
                |conversion| {
                    Ok(SynSource::Table(open(from, names::SYNS, conversion.source_sizes())?, conversion))
                },
            )
        } else if has(names::NOTES) {
            version_5::open_map(from, from_layout).map(|(map, fields, key)| {
                adopt(key);
                SynSource::Version5(map, fields)
            })
        } else {
            Conversion::new(names::SYN_CACHE, from_layout, to_layout).and_then(|conversion| {
                adopt(SynCache::open(from).map_err(|e| e.to_string())?.state().key);
                let map = open(from, names::SYN_CACHE, conversion.source_sizes())?;
                Ok(SynSource::Lines(map, conversion))
            })
        };
        match opened {
            Ok(from) => Ok(Some(Self { from, to })),
            Err(what) => {
                migrated.lose(names::SYN_CACHE, from_layout.abi, what);
                Ok(None)
            }
        }
    }

    /// Copies the cached SYNs of services and backends that are the same here.
    pub fn copy(&self, copier: &Copier, migrated: &mut Migrated) -> Result<(), DataplaneError> {
        let now_s = clock::boot_s();
        let tick = now_tick();
        let mut count = 0;
        let result = match &self.from {
            SynSource::Table(map, conversion) => {
                let (key_size, value_size) = conversion.source_sizes();
                batch::for_each_raw(map, key_size, value_size, |key, value| {
                    let Some((key, flow)) = conversion.entry::<FlowKey, Flow>(key, value) else { return };
                    let age_s = now_s.saturating_sub(flow.last_seen_s);
                    let is_ours =
                        copier.services.contains(&key.service) && copier.backends.contains(&flow.backend);
                    if is_ours && age_s <= SYN_TIMEOUT_S {
                        let sequence = syn_cache::upper_half(flow.created_s);
                        let syn = CachedSyn { backend: flow.backend, sequence, age_s };
                        count += u64::from(self.to.set(&key, syn));
                    }
                })
            }
            SynSource::Version5(map, fields) => batch::for_each_raw(map, 4, fields.size, |key, line| {
                let place = key.try_into().map_or(u32::MAX, u32::from_ne_bytes);
                if place < version_5::LINES {
                    for entry in version_5::entries(line, fields) {
                        count += u64::from(self.copy_version_5(place, entry, copier, now_s));
                    }
                }
            }),
            SynSource::Lines(map, conversion) => {
                let (key_size, value_size) = conversion.source_sizes();
                batch::for_each_raw(map, key_size, value_size, |key, value| {
                    let Some((place, line)) = conversion.entry::<u32, syn_cache::SynCacheLine>(key, value)
                    else {
                        return;
                    };
                    if place >= syn_cache::LINES {
                        return;
                    }
                    for (head, sequence) in line.heads.into_iter().zip(line.sequences) {
                        let is_ours = head != 0
                            && syn_cache::is_fresh(head, tick)
                            && copier.backends.contains(&syn_cache::backend(head));
                        count += u64::from(is_ours && self.to.write(place, head, sequence, tick));
                    }
                })
            }
        };
        result.map_err(|source| DataplaneError::Read { map: names::SYN_CACHE, source })?;
        *migrated.entries.entry(names::SYN_CACHE).or_default() += count;
        Ok(())
    }

    /// Copies an entry of version 5. The line tells fewer bits of the hash than select one of ours: the entry goes to all
    /// lines that it may belong to, where its tag keeps it from being taken for another flow's.
    fn copy_version_5(
        &self,
        place: u32,
        (hash, second, backend, sequence): (u64, u8, u32, u32),
        copier: &Copier,
        now_s: u32,
    ) -> bool {
        let age_s = u32::from((now_s as u8).wrapping_sub(second));
        if age_s > SYN_TIMEOUT_S || !copier.backends.contains(&backend) {
            return false;
        }
        let syn = CachedSyn { backend, sequence: syn_cache::upper_half(sequence), age_s };
        let mut is_new = false;
        for line in (place..syn_cache::LINES).step_by(version_5::LINES as usize) {
            is_new |= self.to.write_syn(line, hash, syn);
        }
        is_new
    }
}
