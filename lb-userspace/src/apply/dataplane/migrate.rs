//! Copies flows from another ABI version's maps into ours, repeatedly if needed: unchanged entries stay.
//!
//! An entry is copied only if its indices mean the same in both sets of maps: the same service, and a backend with the
//! same address.

mod syns;

use super::{
    DataplaneError, batch,
    layout::{Conversion, Layout},
    sys,
    takeover::IndexAssignment,
};
use crate::clock;
use lb_common::{
    Address, Flow, FlowKey, Nat, Reply, ReplyKey, ServiceKey, Vip, VipKey, flow, names,
    nat::flags::{CLIENT_FIN, CLIENT_RST, FRESH, NEW},
    service::{NO_SERVICE, TCP, UDP},
};
use std::{
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::OwnedFd,
    path::Path,
};
use syns::SynCachePair;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Result of a takeover.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Migrated {
    /// Number of entries copied, by map.
    pub entries: BTreeMap<&'static str, u64>,
    /// Number of entries whose services or backends have another index now, or are gone.
    pub reassigned: u64,
    /// Number of entries for which there was no room.
    pub no_room: u64,
    /// Maps that could not be read: name, version, error.
    pub lost: Vec<(&'static str, u32, String)>,
}

impl Migrated {
    /// Records a map whose flows are lost.
    pub fn lose(&mut self, map: &'static str, abi: u32, what: String) {
        self.lost.push((map, abi, what));
    }
}

/// Time since which changes are copied.
#[derive(Clone, Copy, Debug)]
pub struct Changed {
    since_s: u32,
}

impl Changed {
    /// Changes from now on. Entries record seconds of a coarse clock, hence the margin.
    pub fn now() -> Self {
        Self { since_s: clock::boot_s().saturating_sub(2) }
    }
}

/// Opens a map and checks its sizes.
fn open(home: &Path, name: &'static str, sizes: (usize, usize)) -> Result<OwnedFd, String> {
    let path = home.join(name);
    let data = aya::maps::MapData::from_pin(&path).map_err(|e| format!("map {name}: {e}"))?;
    let info = data.info().map_err(|e| format!("map {name}: {e}"))?;
    let real = (info.key_size() as usize, info.value_size() as usize);
    if real != sizes {
        return Err(format!("map {name} has entries of {real:?} bytes, but is described with {sizes:?}"));
    }
    sys::open(&path).map_err(|e| format!("map {name}: {e}"))
}

/// Calls `each` with every entry of a map, converted to this version.
pub fn for_each<K: FromBytes, V: FromBytes>(
    home: &Path,
    name: &'static str,
    layout: &Layout,
    mut each: impl FnMut(K, V),
) -> Result<(), String> {
    let conversion = Conversion::new(name, layout, &Layout::ours())?;
    let sizes = conversion.source_sizes();
    let map = open(home, name, sizes)?;
    batch::for_each_raw(&map, sizes.0, sizes.1, |key, value| {
        if let Some((key, value)) = conversion.entry(key, value) {
            each(key, value);
        }
    })
    .map_err(|e| format!("map {name}: {e}"))
}

/// Common interface of the values that describe flows.
trait FlowValue: FromBytes + IntoBytes + Immutable + Copy + PartialEq {
    type Key: FromBytes + IntoBytes + Immutable + Copy;
    /// Index of the entry's service.
    fn service(key: &Self::Key, value: &Self) -> u32;
    /// Index of the entry's backend, if it names one.
    fn backend(&self) -> Option<u32>;
    /// Whether the entry may have changed since.
    fn is_recent(&self, since_s: u32) -> bool;
    /// Whether the client has ended its side of the flow, so that its addresses and ports may be another flow's soon.
    fn is_closing(&self) -> bool;
    /// New value of our entry where the other version has this one; none: ours stays.
    fn merged(&self, ours: &Self) -> Option<Self>;
}

/// The value that was seen last, or `both` if both were seen in the same second. None: ours stays.
fn later<E: PartialEq + Copy>(
    (theirs, theirs_s): (&E, u32),
    (ours, ours_s): (&E, u32),
    both: E,
) -> Option<E> {
    match theirs_s.cmp(&ours_s) {
        Ordering::Greater => Some(*theirs),
        Ordering::Equal => (both != *ours).then_some(both),
        Ordering::Less => None,
    }
}

impl FlowValue for Flow {
    type Key = FlowKey;

    fn service(key: &FlowKey, _: &Self) -> u32 {
        key.service
    }

    fn backend(&self) -> Option<u32> {
        Some(self.backend)
    }

    fn is_recent(&self, since_s: u32) -> bool {
        self.last_seen_s >= since_s
    }

    fn is_closing(&self) -> bool {
        self.flags & flow::flags::CLOSING != 0
    }

    fn merged(&self, ours: &Self) -> Option<Self> {
        // Within one second, either side may have seen the end of the flow.
        later(
            (self, self.last_seen_s),
            (ours, ours.last_seen_s),
            Self { flags: ours.flags | self.flags, ..*ours },
        )
    }
}

impl FlowValue for Nat {
    type Key = FlowKey;

    fn service(key: &FlowKey, _: &Self) -> u32 {
        key.service
    }

    fn backend(&self) -> Option<u32> {
        Some(self.backend)
    }

    fn is_recent(&self, since_s: u32) -> bool {
        self.last_seen_s >= since_s
    }

    fn is_closing(&self) -> bool {
        self.flags & (CLIENT_FIN | CLIENT_RST) != 0
    }

    fn merged(&self, ours: &Self) -> Option<Self> {
        // Bits that programs clear, and bits that they set.
        let passing = FRESH | NEW;
        let flags = (self.flags & ours.flags & passing) | ((self.flags | ours.flags) & !passing);
        later((self, self.last_seen_s), (ours, ours.last_seen_s), Self { flags, ..*ours })
    }
}

impl FlowValue for Reply {
    type Key = ReplyKey;

    fn service(_: &ReplyKey, value: &Self) -> u32 {
        value.flow.service
    }

    fn backend(&self) -> Option<u32> {
        None
    }

    /// A client's packet changes the state of its flow without recording the time.
    fn is_recent(&self, _: u32) -> bool {
        true
    }

    /// Workers' packets need it until the end.
    fn is_closing(&self) -> bool {
        false
    }

    fn merged(&self, ours: &Self) -> Option<Self> {
        if self.flow != ours.flow {
            // The port belongs to another flow by now.
            return (self.last_seen_s > ours.last_seen_s).then_some(*self);
        }
        let later = if self.last_seen_s > ours.last_seen_s { self } else { ours };
        let both = Self { flags: self.flags | ours.flags, ..*later };
        (both != *ours).then_some(both)
    }
}

/// A map with flows, in both versions.
struct TablePair {
    name: &'static str,
    conversion: Conversion,
    from: OwnedFd,
    to: OwnedFd,
}

/// Copies the flows of one predecessor.
pub struct Copier {
    /// Services and backends that are the same in both versions.
    services: BTreeSet<u32>,
    backends: BTreeSet<u32>,
    syns: Option<SynCachePair>,
    flows: Vec<TablePair>,
    nats: Option<TablePair>,
    replies: Option<TablePair>,
}

impl Copier {
    /// Prepares the copy from a home with this layout to ours.
    pub fn new(
        (from, from_layout): (&Path, &Layout),
        (to, to_layout): (&Path, &Layout),
        theirs: &IndexAssignment,
        ours: &IndexAssignment,
        migrated: &mut Migrated,
    ) -> Result<Self, DataplaneError> {
        let syns = SynCachePair::open((from, from_layout), (to, to_layout), migrated)?;
        let mut table = |name: &'static str| -> Result<Option<TablePair>, DataplaneError> {
            let own_sizes = to_layout.sizes(name);
            let own = own_sizes.and_then(|sizes| open(to, name, sizes));
            let to = own.map_err(|what| DataplaneError::Own { path: to.to_owned(), what })?;
            let from = Conversion::new(name, from_layout, to_layout)
                .and_then(|conversion| Ok((open(from, name, conversion.source_sizes())?, conversion)));
            match from {
                Ok((from, conversion)) => Ok(Some(TablePair { name, conversion, from, to })),
                Err(what) => {
                    migrated.lose(name, from_layout.abi, what);
                    Ok(None)
                }
            }
        };
        let (their_services, our_services) = (services(theirs), services(ours));
        let same = |index: &u32| their_services.get(index) == our_services.get(index);
        let is_same_backend = |index: &u32| {
            let ours = ours.backends.get(index);
            ours.is_some_and(|b| {
                let theirs = &theirs.backends[index];
                b.address == theirs.address && b.service == theirs.service && same(&b.service)
            })
        };
        let flows = [table(names::FLOWS)?, table(names::UDP_FLOWS)?];
        Ok(Self {
            services: their_services.keys().copied().filter(same).collect(),
            backends: theirs.backends.keys().copied().filter(is_same_backend).collect(),
            syns,
            flows: flows.into_iter().flatten().collect(),
            nats: table(names::NAT_FLOWS)?,
            replies: table(names::NAT_REPLIES)?,
        })
    }

    /// Copies everything but closing flows, or, once our program runs, these and the entries that may have changed since.
    /// While the other program runs, a client may begin a new flow where one has closed, and the copy would send it to the
    /// old flow's worker; our program asks the other one about flows that it does not know.
    ///
    /// SYNs come first, because the packets that complete their handshakes need them.
    pub fn copy_all(
        &mut self,
        since: Option<Changed>,
        migrated: &mut Migrated,
    ) -> Result<(), DataplaneError> {
        let since_s = since.map_or(0, |c| c.since_s);
        if let Some(syns) = &self.syns {
            syns.copy(self, migrated)?;
        }
        for table in &self.flows {
            self.copy::<Flow>(table, since_s, migrated)?;
        }
        if let Some(table) = &self.replies {
            self.copy::<Reply>(table, since_s, migrated)?;
        }
        if let Some(table) = &self.nats {
            self.copy::<Nat>(table, since_s, migrated)?;
        }
        Ok(())
    }

    fn copy<E: FlowValue>(
        &self,
        table: &TablePair,
        since_s: u32,
        migrated: &mut Migrated,
    ) -> Result<(), DataplaneError> {
        let (key_size, value_size) = table.conversion.source_sizes();
        let is_first = since_s == 0;
        let mut failed = None;
        let read = batch::for_each_raw(&table.from, key_size, value_size, |key, value| {
            let Some((key, value)) = table.conversion.entry::<E::Key, E>(key, value) else { return };
            let is_wanted =
                if is_first { !value.is_closing() } else { value.is_recent(since_s) || value.is_closing() };
            if !is_wanted {
                return;
            }
            let is_ours = self.services.contains(&E::service(&key, &value))
                && value.backend().is_none_or(|backend| self.backends.contains(&backend));
            if !is_ours {
                // Counted in the first pass only, which sees all entries.
                migrated.reassigned += u64::from(is_first);
                return;
            }
            match put(&table.to, &key, &value) {
                Ok(true) => *migrated.entries.entry(table.name).or_default() += 1,
                Ok(false) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::E2BIG | libc::ENOMEM)) => {
                    migrated.no_room += 1;
                }
                Err(error) => failed = Some(error),
            }
        });
        read.and(failed.map_or(Ok(()), Err))
            .map_err(|source| DataplaneError::Read { map: table.name, source })
    }
}

/// Updates one of our entries; true if there was none.
fn put<E: FlowValue>(map: &OwnedFd, key: &E::Key, value: &E) -> io::Result<bool> {
    let (key, mut known) = (key.as_bytes(), *value);
    if sys::lookup(map, key, known.as_mut_bytes())? {
        if let Some(merged) = value.merged(&known) {
            sys::update(map, key, merged.as_bytes(), 0)?;
        }
        return Ok(false);
    }
    // A packet may have created the entry meanwhile.
    sys::update(map, key, value.as_bytes(), sys::NO_EXIST)
}

/// Identity of a service in packets: VIP, first and last port, protocol.
type ServiceIdentity = (Address, u16, u16, u8);

/// Service of each index.
fn services(identity: &IndexAssignment) -> BTreeMap<u32, ServiceIdentity> {
    let mut all = BTreeMap::new();
    for (ServiceKey { vip, port, protocol, .. }, &index) in &identity.index {
        all.insert(index, (*vip, port.get(), port.get(), *protocol));
    }
    for (VipKey { vip }, Vip { any_tcp, any_udp, range_count, ranges, .. }) in &identity.vips {
        for range in ranges.iter().take(*range_count as usize) {
            all.insert(range.service, (*vip, range.first, range.last, range.protocol as u8));
        }
        for (index, protocol) in [(*any_tcp, TCP), (*any_udp, UDP)] {
            if index != NO_SERVICE {
                all.insert(index, (*vip, 0, u16::MAX, protocol));
            }
        }
    }
    all
}
