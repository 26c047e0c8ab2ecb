//! Takes over from objects of another ABI version while they forward.
//!
//! The new maps exist beside the old ones, with tables compiled for the same indices ([`Predecessor::identity`]). Then
//! [`Takeover::finish`] copies the flows, replaces the program under each link in one step, and copies the flows again,
//! because some have changed since. Until that is done, a packet whose flow no table knows goes on to the old program by
//! a tail call ([`names::TAKEOVER`]), so that no flow is placed again while its entry is being copied. Last, the old pins
//! are removed.
//!
//! A daemon that is killed at any point leaves programs under the links that forward, with their own maps; the next
//! start, of either version, determines by the links which of the homes is live, and continues from there. A home of its
//! own version from which the live one has not copied all flows yet is set aside, and is one more predecessor.
//!
//! Services and backends keep their indices; tables are compiled anew from desired state and memory, with all slots
//! marked as tracked until a sweep finds no flows. SYNs are copied first of all, and while the old program is asked,
//! only SYNs take ports for new bindings.

use super::{
    DataplaneError, MapLimits, attach, grace_period,
    layout::Layout,
    links::{self, XdpLink},
    migrate::{self, Changed, Migrated},
    pins::{self, Home},
    sys,
    variant::ArrayPin,
};
use aya::programs::ProgramFd;
use lb_common::{Backend, ServiceKey, Vip, VipKey, backend::flags::USED, names, service::NO_SERVICE};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Another version's objects.
pub struct Predecessor {
    home: Home,
    /// Layout of its entries; none where it has no flows.
    layout: Option<Layout>,
}

/// Indices of services and backends in a set of maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexAssignment {
    /// `SERVICE_INDEX`.
    pub index: BTreeMap<ServiceKey, u32>,
    /// `VIPS`.
    pub vips: BTreeMap<VipKey, Vip>,
    /// Used entries of `BACKENDS`.
    pub backends: BTreeMap<u32, Backend>,
}

impl IndexAssignment {
    /// Reads maps with this layout; an error says why they cannot be read.
    pub fn read(home: &Path, layout: &Layout) -> Result<Self, String> {
        let mut identity = Self::default();
        migrate::for_each(home, names::SERVICE_INDEX, layout, |key, index: u32| {
            identity.index.insert(key, index);
        })?;
        migrate::for_each(home, names::VIPS, layout, |key, vip| {
            identity.vips.insert(key, vip);
        })?;
        migrate::for_each(home, names::BACKENDS, layout, |index: u32, backend: Backend| {
            if backend.flags & USED != 0 {
                identity.backends.insert(index, backend);
            }
        })?;
        Ok(identity)
    }

    /// Drops indices beyond the size of our maps; their owners get new ones.
    pub fn within(self, limits: &MapLimits) -> Self {
        let fits = |index: &mut u32| {
            if *index >= limits.services {
                *index = NO_SERVICE;
            }
        };
        let mut vips = self.vips;
        for vip in vips.values_mut() {
            fits(&mut vip.any_tcp);
            fits(&mut vip.any_udp);
            let used = (vip.range_count as usize).min(vip.ranges.len());
            let (kept, gone): (Vec<_>, Vec<_>) =
                vip.ranges[..used].iter().copied().partition(|r| r.service < limits.services);
            vip.range_count = kept.len() as u32;
            for (place, range) in vip.ranges.iter_mut().zip(kept.into_iter().chain(gone)) {
                *place = range;
            }
        }
        Self {
            index: self.index.into_iter().filter(|(_, index)| *index < limits.services).collect(),
            vips,
            backends: self
                .backends
                .into_iter()
                .filter(|(index, b)| *index < limits.backends && b.service < limits.services)
                .collect(),
        }
    }
}

impl Predecessor {
    /// A predecessor whose flows are taken over.
    pub fn new(home: Home, layout: Layout) -> Self {
        Self { home, layout: Some(layout) }
    }

    /// A predecessor without flows.
    pub fn without_flows(home: Home) -> Self {
        Self { home, layout: None }
    }

    /// Home of its objects.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// ABI version of its objects.
    pub fn abi(&self) -> u32 {
        self.home.abi
    }

    /// Indices of its services and backends; an error says why they cannot be read.
    pub fn identity(&self) -> Result<IndexAssignment, String> {
        let layout = self.layout.as_ref().ok_or("its maps hold no flows")?;
        IndexAssignment::read(&self.home.path, layout)
    }
}

/// Steps that remain once the tables are written.
pub struct Takeover {
    pub(super) pin_path: PathBuf,
    pub(super) home: Home,
    /// Other versions; the running one comes last.
    pub(super) predecessors: Vec<Predecessor>,
    /// Names of the configured interfaces.
    pub(super) interfaces: Vec<String>,
    /// Links under which another version's program runs.
    pub(super) links: Vec<XdpLink>,
    /// Programs to pin.
    pub(super) programs: Vec<&'static str>,
    /// Program to run.
    pub(super) program: ProgramFd,
    /// Program that users' programs tail call.
    pub(super) chained: Option<ProgramFd>,
    /// Program arrays: those that versions share, then our own.
    pub(super) arrays: Vec<ArrayPin>,
    /// Number of shared arrays.
    pub(super) shared: usize,
    pub(super) has_flows: bool,
    /// Whether no program of our home forwards yet.
    pub(super) is_fresh: bool,
}

impl Takeover {
    /// ABI version that forwards.
    pub fn abi(&self) -> u32 {
        self.predecessors.last().map_or(0, Predecessor::abi)
    }

    /// Indices of the predecessor, where the tables are still to be compiled.
    pub fn identity(&self) -> Option<IndexAssignment> {
        let running = self.predecessors.last().filter(|p| self.is_fresh && p.layout.is_some())?;
        match running.identity() {
            Ok(identity) => Some(identity),
            Err(what) => {
                tracing::warn!(
                    abi = running.abi(),
                    what,
                    "cannot read the indices of the other ABI version: its flows are lost"
                );
                None
            }
        }
    }

    /// Copies the flows, replaces the programs, and removes the old objects.
    pub fn finish(mut self) -> Result<Migrated, DataplaneError> {
        let mut migrated = Migrated::default();
        // A predecessor may itself have been taking over from others when it was killed. They are predecessors, too, and
        // packets go on from one to the next until the end. They cannot go in circles: no two homes share maps.
        let mut copiers = self.copiers(&mut migrated)?;
        let changed = Changed::now();
        for copier in &mut copiers {
            copier.copy_all(None, &mut migrated)?;
        }
        let uses_predecessor = !copiers.is_empty() && self.enable_predecessor()?;
        for link in &self.links {
            link.update(&self.program)?;
        }
        self.is_fresh = false;
        self.chain()?;
        // From here on, the old program runs only by the new one's tail call.
        grace_period();
        for copier in &mut copiers {
            copier.copy_all(Some(changed), &mut migrated)?;
        }
        if uses_predecessor {
            // Copy again what the old program has written since; then stop sending packets there.
            for copier in &mut copiers {
                copier.copy_all(Some(changed), &mut migrated)?;
            }
            set_flag(&self.home, false)?;
            grace_period();
            for copier in &mut copiers {
                copier.copy_all(Some(changed), &mut migrated)?;
            }
            self.clear_predecessor()?;
        }
        drop(copiers);
        self.settle()?;
        for predecessor in std::mem::take(&mut self.predecessors) {
            predecessor.home.remove()?;
        }
        self.tidy_shared()?;
        Ok(migrated)
    }

    /// Last steps of any start: unpins programs that ran before, detaches from interfaces that are no longer configured,
    /// and records the version.
    pub(super) fn settle(&mut self) -> Result<(), DataplaneError> {
        // A link that is pinned under the name of an interface that is missing belongs to one that was renamed, or moved.
        let wanted = self
            .interfaces
            .iter()
            .filter_map(|name| links::index_of(name).ok().or_else(|| links::pinned_to(&self.pin_path, name)));
        links::drop_others(&self.pin_path, &wanted.collect())?;
        self.arrays.iter_mut().try_for_each(ArrayPin::settle)?;
        for name in &self.programs {
            let path = self.home.path.join(format!("program-{name}"));
            let next = pins::next(&path);
            if next.exists() {
                std::fs::rename(&next, &path).map_err(|source| DataplaneError::Pin {
                    what: "cannot rename",
                    path: next,
                    source,
                })?;
            }
        }
        attach::set_abi(&self.pin_path, &self.home)?;
        self.is_fresh = false;
        Ok(())
    }

    /// Creates a copier for each predecessor whose flows can be read; records those that cannot.
    fn copiers(&self, migrated: &mut Migrated) -> Result<Vec<migrate::Copier>, DataplaneError> {
        let mut copiers = Vec::new();
        if !self.has_flows {
            return Ok(copiers);
        }
        let layout = Layout::ours();
        let own = IndexAssignment::read(&self.home.path, &layout)
            .map_err(|what| DataplaneError::Own { path: self.home.path.clone(), what })?;
        for predecessor in &self.predecessors {
            match (&predecessor.layout, predecessor.identity()) {
                (Some(from), Ok(identity)) => {
                    let from = (predecessor.home.path.as_path(), from);
                    copiers.push(migrate::Copier::new(
                        from,
                        (&self.home.path, &layout),
                        &identity,
                        &own,
                        migrated,
                    )?);
                }
                (_, Err(what)) => migrated.lose("all", predecessor.abi(), what),
                (None, Ok(_)) => {}
            }
        }
        Ok(copiers)
    }

    /// Sends packets of flows that no table knows to the old program; false if it is not available.
    fn enable_predecessor(&self) -> Result<bool, DataplaneError> {
        let Some(running) = self.predecessors.last() else { return Ok(false) };
        let path = running.home.path.join(format!("program-{}", names::PROGRAM_INGRESS));
        let Ok(program) = sys::open(&path) else {
            tracing::warn!(
                path = %path.display(),
                "the other ABI version's program is not pinned: flows that begin during the takeover may be placed again"
            );
            return Ok(false);
        };
        match put_program(&self.stages()?, names::stage::PREDECESSOR, &program) {
            Ok(()) => set_flag(&self.home, true).map(|()| true),
            Err(error) => {
                tracing::warn!(%error, "cannot tail call the other ABI version's program: flows that begin during the takeover may be placed again");
                Ok(false)
            }
        }
    }

    fn stages(&self) -> Result<OwnedFd, DataplaneError> {
        let own = self.arrays.last().expect("there is always our own");
        open_stages(&own.used)
    }

    fn clear_predecessor(&self) -> Result<(), DataplaneError> {
        sys::delete(&self.stages()?, &names::stage::PREDECESSOR.to_ne_bytes()).map_err(in_stages)
    }

    /// Lets users' programs tail call ours.
    fn chain(&self) -> Result<(), DataplaneError> {
        let Some(program) = &self.chained else { return Ok(()) };
        for array in &self.arrays[..self.shared] {
            put_program(&open_stages(&array.used)?, names::stage::INGRESS, program).map_err(in_stages)?;
        }
        Ok(())
    }

    /// Removes the stages that version 2 kept in what is now the users' array.
    fn tidy_shared(&self) -> Result<(), DataplaneError> {
        use names::stage::{AFTER, BEFORE, COUNT, INGRESS};
        for array in &self.arrays[..self.shared] {
            let places = open_stages(&array.used)?;
            for place in (0..COUNT).filter(|place| ![BEFORE, AFTER, INGRESS].contains(place)) {
                sys::delete(&places, &place.to_ne_bytes()).map_err(in_stages)?;
            }
        }
        Ok(())
    }
}

impl Drop for Takeover {
    /// Removes what was created by a start that ends before its program runs.
    fn drop(&mut self) {
        if self.is_fresh
            && !self.predecessors.is_empty()
            && let Err(error) = self.home.remove()
        {
            tracing::warn!(%error, "cannot remove the objects of a failed start; the next start removes them");
        }
    }
}

fn in_stages(source: io::Error) -> DataplaneError {
    DataplaneError::Read { map: names::STAGES, source }
}

fn open_stages(path: &Path) -> Result<OwnedFd, DataplaneError> {
    sys::open(path).map_err(in_stages)
}

fn put_program(places: &OwnedFd, place: u32, program: &impl AsFd) -> io::Result<()> {
    let program = program.as_fd().as_raw_fd().to_ne_bytes();
    sys::update(places, &place.to_ne_bytes(), &program, 0).map(drop)
}

/// A home's `TAKEOVER`; none in homes of versions before it.
fn flag_of(home: &Home) -> Result<Option<OwnedFd>, DataplaneError> {
    let path = home.path.join(names::TAKEOVER);
    if path.exists() { sys::open(&path).map(Some).map_err(in_flag) } else { Ok(None) }
}

fn in_flag(source: io::Error) -> DataplaneError {
    DataplaneError::Read { map: names::TAKEOVER, source }
}

/// Whether a home's program sends packets of flows that no table knows to the program before it.
pub(super) fn is_on(home: &Home) -> Result<bool, DataplaneError> {
    let Some(map) = flag_of(home)? else { return Ok(false) };
    let mut flag = [0; 4];
    sys::lookup(&map, &0u32.to_ne_bytes(), &mut flag).map_err(in_flag)?;
    Ok(flag != [0; 4])
}

/// Sets whether a home's program tail calls its predecessor's. A home without the map never does.
fn set_flag(home: &Home, is_on: bool) -> Result<(), DataplaneError> {
    let Some(map) = flag_of(home)? else { return Ok(()) };
    sys::update(&map, &0u32.to_ne_bytes(), &u32::from(is_on).to_ne_bytes(), 0).map(drop).map_err(in_flag)
}
