//! Takes over from objects of another ABI version while they forward.
//!
//! The new maps lie beside the old ones, with tables compiled for the same indices ([`Predecessor::identity`]). Then, in
//! [`Takeover::finish`]: flows are copied; the program under each link changes in one step; flows are copied again, as
//! some have changed since. Until that is done, a packet whose flow no table knows goes on to the old program by a tail
//! call ([`names::TAKEOVER`]), so none is placed anew while its entry is on the way. Last, the old pins are removed.
//!
//! Whoever is killed at any point leaves programs under the links that forward, with maps of their own; the next start,
//! of either version, finds by the links which of the two homes lives, and goes on from there.
//!
//! Services and backends keep their indices; tables are compiled anew from desired state and memory, with all slots
//! marked as tracked until a sweep finds no flows. SYNs are copied first of all, and while the old program is asked,
//! only SYNs take ports for new bindings.

use super::{
    DataplaneError, attach, grace_period,
    layout::Layout,
    links::{self, Link},
    migrate::{self, Carried, Changed},
    pins::{self, Home},
    sys,
    variant::ArrayPin,
};
use aya::programs::ProgramFd;
use lb_common::{Backend, ServiceKey, Vip, VipKey, backend::flags::USED, names};
use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

/// Another version's objects.
pub struct Predecessor {
    home: Home,
    /// What its entries look like; None where it has no flows.
    layout: Option<Layout>,
}

/// Who has which index in a set of maps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// `SERVICE_INDEX`.
    pub index: BTreeMap<ServiceKey, u32>,
    /// `VIPS`.
    pub vips: BTreeMap<VipKey, Vip>,
    /// Used entries of `BACKENDS`.
    pub backends: BTreeMap<u32, Backend>,
}

impl Identity {
    /// As maps with this layout have it; else why they cannot be read.
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
}

impl Predecessor {
    /// Whose flows are to be taken over.
    pub fn new(home: Home, layout: Layout) -> Self {
        Self { home, layout: Some(layout) }
    }

    /// That has none.
    pub fn without_flows(home: Home) -> Self {
        Self { home, layout: None }
    }

    /// Where its objects are.
    pub fn home(&self) -> &Home {
        &self.home
    }

    /// Its version.
    pub fn abi(&self) -> u32 {
        self.home.abi
    }

    /// Who has which index; else why that cannot be read.
    pub fn identity(&self) -> Result<Identity, String> {
        let layout = self.layout.as_ref().ok_or("it has no flows")?;
        Identity::read(&self.home.path, layout)
    }
}

/// What is left to do once the tables are written.
pub struct Takeover {
    pub(super) pin_path: PathBuf,
    pub(super) home: Home,
    /// The one that runs comes last.
    pub(super) predecessors: Vec<Predecessor>,
    /// Interfaces that are wanted.
    pub(super) interfaces: Vec<String>,
    /// Links under which another version's program runs.
    pub(super) links: Vec<Link>,
    /// Programs to pin.
    pub(super) programs: Vec<&'static str>,
    /// The one to run.
    pub(super) program: ProgramFd,
    /// The one that users' programs go on to.
    pub(super) chained: Option<ProgramFd>,
    /// Program arrays: those that versions share, then our own.
    pub(super) arrays: Vec<ArrayPin>,
    /// How many of them are shared.
    pub(super) shared: usize,
    pub(super) has_flows: bool,
    /// Whether our home has nothing yet that forwards.
    pub(super) is_fresh: bool,
}

impl Takeover {
    /// The version that forwards.
    pub fn abi(&self) -> u32 {
        self.predecessors.last().map_or(0, Predecessor::abi)
    }

    /// The predecessor's indices, where the tables are still to be compiled.
    pub fn identity(&self) -> Option<Identity> {
        let running = self.predecessors.last().filter(|p| self.is_fresh && p.layout.is_some())?;
        match running.identity() {
            Ok(identity) => Some(identity),
            Err(what) => {
                tracing::warn!(
                    abi = running.abi(),
                    what,
                    "indices of the other ABI version cannot be read: its flows are lost"
                );
                None
            }
        }
    }

    /// Copies the flows, changes the programs, and removes what ran before.
    pub fn finish(mut self) -> Result<Carried, DataplaneError> {
        let mut carried = Carried::default();
        for predecessor in &self.predecessors {
            // Were it in the middle of taking over from us, packets would go in circles.
            set_flag(&predecessor.home, false)?;
        }
        let mut copiers = self.copiers(&mut carried)?;
        let changed = Changed::now();
        for copier in &mut copiers {
            copier.copy_all(None, &mut carried)?;
        }
        let asks = !copiers.is_empty() && self.ask_predecessor()?;
        for link in &self.links {
            link.update(&self.program)?;
        }
        self.is_fresh = false;
        self.chain()?;
        // Nobody is in the old program any more but by the new one's tail call.
        grace_period();
        for copier in &mut copiers {
            copier.copy_all(Some(changed), &mut carried)?;
        }
        if asks {
            // Again, for what the old program has written since; and then nothing is sent there any more.
            for copier in &mut copiers {
                copier.copy_all(Some(changed), &mut carried)?;
            }
            set_flag(&self.home, false)?;
            grace_period();
            for copier in &mut copiers {
                copier.copy_all(Some(changed), &mut carried)?;
            }
            self.empty_place()?;
        }
        drop(copiers);
        self.settle()?;
        for predecessor in std::mem::take(&mut self.predecessors) {
            predecessor.home.remove()?;
        }
        self.tidy_shared()?;
        Ok(carried)
    }

    /// The last steps of any start: programs that ran before are forgotten, interfaces that are no longer wanted too,
    /// and the version is written down.
    pub(super) fn settle(&mut self) -> Result<(), DataplaneError> {
        let wanted = self.interfaces.iter().filter_map(|name| links::index_of(name).ok());
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

    /// One for each predecessor whose flows can be read; what cannot is noted.
    fn copiers(&self, carried: &mut Carried) -> Result<Vec<migrate::Copier>, DataplaneError> {
        let mut copiers = Vec::new();
        if !self.has_flows {
            return Ok(copiers);
        }
        let layout = Layout::ours();
        let own = Identity::read(&self.home.path, &layout)
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
                        carried,
                    )?);
                }
                (_, Err(what)) => carried.lose("all", predecessor.abi(), what),
                (None, Ok(_)) => {}
            }
        }
        Ok(copiers)
    }

    /// Sends packets of flows that no table knows to the program that runs; false if it cannot be had.
    fn ask_predecessor(&self) -> Result<bool, DataplaneError> {
        let Some(running) = self.predecessors.last() else { return Ok(false) };
        let path = running.home.path.join(format!("program-{}", names::PROGRAM_INGRESS));
        let Ok(program) = sys::open(&path) else {
            tracing::warn!(
                path = %path.display(),
                "the other ABI version's program is not pinned: flows that begin in this very moment may be placed anew"
            );
            return Ok(false);
        };
        match put_program(&self.stages()?, names::stage::PREDECESSOR, &program) {
            Ok(()) => set_flag(&self.home, true).map(|()| true),
            Err(error) => {
                tracing::warn!(%error, "the other ABI version's program cannot be jumped to");
                Ok(false)
            }
        }
    }

    fn stages(&self) -> Result<OwnedFd, DataplaneError> {
        let own = self.arrays.last().expect("there is always our own");
        open_stages(&own.used)
    }

    fn empty_place(&self) -> Result<(), DataplaneError> {
        sys::delete(&self.stages()?, &names::stage::PREDECESSOR.to_ne_bytes()).map_err(in_stages)
    }

    /// Lets users' programs go on to ours.
    fn chain(&self) -> Result<(), DataplaneError> {
        let Some(program) = &self.chained else { return Ok(()) };
        for array in &self.arrays[..self.shared] {
            put_program(&open_stages(&array.used)?, names::stage::INGRESS, program).map_err(in_stages)?;
        }
        Ok(())
    }

    /// Version 2 kept its own stages in what is now the users' map.
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
    /// A start that ends before its program runs leaves nothing but what ran before.
    fn drop(&mut self) {
        if self.is_fresh
            && !self.predecessors.is_empty()
            && let Err(error) = self.home.remove()
        {
            tracing::warn!(%error, "what this start made is left behind; the next one removes it");
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

/// Sets whether a home's program asks its predecessor's. One without that map never does.
fn set_flag(home: &Home, is_on: bool) -> Result<(), DataplaneError> {
    let path = home.path.join(names::TAKEOVER);
    if !path.exists() {
        return Ok(());
    }
    let read = |source| DataplaneError::Read { map: names::TAKEOVER, source };
    let map: OwnedFd = sys::open(&path).map_err(read)?;
    sys::update(&map, &0u32.to_ne_bytes(), &u32::from(is_on).to_ne_bytes(), 0).map(drop).map_err(read)
}
