//! Loads a program with its maps pinned, and attaches it to interfaces by pinned links.
//!
//! Pins outlive the daemon: forwarding goes on without it. A new daemon reuses the maps and replaces
//! the program under each link in one step (`BPF_LINK_UPDATE`), so that no packet meets no program. Where objects of
//! another ABI version run, it loads its own beside them, and a [`Takeover`] does the rest once the tables are written.

use super::{
    DataplaneError,
    layout::{Layout, write_own},
    links::{self, Interface, Link},
    pins::{self, Home},
    stages,
    takeover::{Predecessor, Takeover},
};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, MapError},
    programs::{ProgramError, ProgramFd, Xdp},
};
use lb_common::{ABI_VERSION, Reason, names};
use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// What to load, and where to attach it.
pub struct Request<'a> {
    /// BPF object.
    pub object: &'static [u8],
    /// Program in it.
    pub program: &'static str,
    /// Programs that it jumps to, and their places in `STAGES`.
    pub stages: &'a [(&'static str, u32)],
    /// The program that users' programs before it jump to.
    pub chained: Option<&'static str>,
    /// Maps to pin.
    pub maps: &'a [&'static str],
    /// Maps that all ABI versions share, and names of their pins.
    pub shared: &'a [(&'static str, &'static str)],
    /// Whether flows stand in its maps, which are to outlive a change of the ABI version.
    pub has_flows: bool,
    /// Map sizes that differ from the object's.
    pub sizes: &'a [(&'static str, u32)],
    /// The settings global, as bytes.
    pub settings: &'a [u8],
    /// aya-log's level.
    pub log_level: u8,
    /// Directory of the pins, on a BPF filesystem.
    pub pin_path: &'a Path,
    /// Interfaces.
    pub interfaces: &'a [String],
    /// Whether generic mode will do where the driver has none.
    pub allow_generic: bool,
}

/// What came of it.
pub struct Attached {
    /// The loaded object.
    pub bpf: Ebpf,
    /// Where it runs, or will once the other ABI version's flows are taken over.
    pub interfaces: Vec<Interface>,
    /// Whether maps of an earlier daemon were taken over.
    pub adopted: bool,
    /// Where its maps are pinned.
    pub home: PathBuf,
    /// What is left to do when the tables are written.
    pub takeover: Option<Takeover>,
    /// Keeps other daemons out while it lives.
    pub lock: fs::File,
}

/// Makes the pin directory, checks what is in it, loads, attaches.
pub fn attach(request: &Request<'_>) -> Result<Attached, DataplaneError> {
    if request.object.is_empty() {
        return Err(DataplaneError::NoPrograms);
    }
    let indices =
        request.interfaces.iter().map(|name| links::index_of(name)).collect::<Result<Vec<_>, _>>()?;
    let is_new = pins::make_directory(request.pin_path)?;
    let lock = pins::lock(request.pin_path)?;
    let result = attach_locked(request, &indices, lock);
    if is_new && result.is_err() {
        // A first start that is refused leaves nothing behind; what it did not make is not empty.
        let _ = fs::remove_dir(request.pin_path);
    }
    result
}

fn attach_locked(request: &Request<'_>, indices: &[u32], lock: fs::File) -> Result<Attached, DataplaneError> {
    let home = Home::ours(request.pin_path);
    let (adopted, others) = look_around(request, &home)?;
    // Before anything is made: what cannot be read is left alone.
    let predecessors = others.iter().map(|other| open(request, other)).collect::<Result<Vec<_>, _>>()?;
    let result = load_beside(request, indices, &home, adopted, predecessors);
    match result {
        Ok((bpf, interfaces, takeover)) => {
            Ok(Attached { bpf, interfaces, adopted, home: home.path, takeover, lock })
        }
        Err(error) => {
            // A first start that failed leaves nothing behind; what ran before stays as it was.
            if !adopted && others.is_empty() {
                pins::remove_all(request.pin_path)?;
            } else if !adopted {
                home.remove()?;
            }
            Err(error)
        }
    }
}

/// Loads the program again, over the maps that are there, and replaces it under its links in one step each. If that
/// fails the old one goes on. None while another ABI version's program still forwards.
pub fn replace(request: &Request<'_>) -> Result<Option<Ebpf>, DataplaneError> {
    let home = Home::ours(request.pin_path);
    if home.programs().is_disjoint(&links::programs(request.pin_path)?) {
        return Ok(None);
    }
    let mut bpf = load(request, &home)?;
    pin_programs(request, &bpf, &home, true)?;
    stages::chain(&mut bpf, request.chained)?;
    for name in request.interfaces {
        if let Some(link) = links::find(request.pin_path, name, links::index_of(name)?)? {
            link.update(&program_fd(&bpf, request.program)?)?;
        }
    }
    for name in programs_of(request) {
        pins::replace(&program_fd(&bpf, name)?, &home.path.join(format!("program-{name}")))?;
    }
    Ok(Some(bpf))
}

/// Whether there are objects of this ABI version to go on with, and those of others whose work is to be taken over.
/// What starts left behind that did not finish is removed.
fn look_around(request: &Request<'_>, home: &Home) -> Result<(bool, Vec<Home>), DataplaneError> {
    let mut others = Home::others(request.pin_path)?;
    if !home.exists() && others.iter().any(|other| other.abi == 0) {
        pins::remove_all(request.pin_path)?;
        others.clear();
    }
    let running = links::programs(request.pin_path)?;
    let runs = |home: &Home| !home.programs().is_disjoint(&running);
    let is_done = home.exists() && home.marker()? == Some(ABI_VERSION);
    let adopted = home.exists() && (runs(home) || (is_done && others.is_empty()));
    if !adopted {
        home.remove()?;
    } else if is_done && !others.iter().any(runs) {
        // Their flows have been taken over; only their removal was cut short.
        others.drain(..).try_for_each(|other| other.remove())?;
    }
    // The one that runs is the last to be asked: its word counts.
    others.sort_by_key(|other| (runs(other), other.abi));
    Ok((adopted, others))
}

/// Opens another version's objects as far as they are needed.
fn open(request: &Request<'_>, other: &Home) -> Result<Predecessor, DataplaneError> {
    if !request.has_flows {
        return Ok(Predecessor::without_flows(other.clone()));
    }
    let layout = Layout::read(other).map_err(|what| DataplaneError::Abi {
        path: request.pin_path.to_owned(),
        pinned: other.abi,
        ours: ABI_VERSION,
        what,
    })?;
    Ok(Predecessor::new(other.clone(), layout))
}

type Loaded = (Ebpf, Vec<Interface>, Option<Takeover>);

fn load_beside(
    request: &Request<'_>,
    indices: &[u32],
    home: &Home,
    adopted: bool,
    predecessors: Vec<Predecessor>,
) -> Result<Loaded, DataplaneError> {
    home.create()?;
    let mut bpf = load(request, home)?;
    if request.has_flows {
        write_own(&mut bpf)?;
    }
    let found: Vec<Option<Link>> = request
        .interfaces
        .iter()
        .zip(indices)
        .map(|(name, ifindex)| links::find(request.pin_path, name, *ifindex))
        .collect::<Result<_, _>>()?;
    pin_programs(request, &bpf, home, adopted)?;
    let waits = !predecessors.is_empty();
    if !waits {
        stages::chain(&mut bpf, request.chained)?;
    }
    let (mut interfaces, mut pending) = (Vec::new(), Vec::new());
    for ((name, ifindex), link) in request.interfaces.iter().zip(indices).zip(found) {
        interfaces.push(match link {
            Some(link) if waits => {
                let interface = link.interface.clone();
                pending.push(link);
                interface
            }
            Some(link) => {
                // The program changes under the link in one step; the old one runs until then.
                link.update(&program_fd(&bpf, request.program)?)?;
                link.interface
            }
            None => {
                let program = program_mut(&mut bpf, request.program);
                links::attach(request.pin_path, program, name, *ifindex, request.allow_generic)?
            }
        });
    }
    let mut takeover = Takeover {
        pin_path: request.pin_path.to_owned(),
        home: home.clone(),
        predecessors,
        interfaces: request.interfaces.to_vec(),
        links: pending,
        programs: programs_of(request),
        program: program_fd(&bpf, request.program)?,
        chained: request.chained.map(|name| program_fd(&bpf, name)).transpose()?,
        shared: request.shared.iter().map(|(_, pin)| request.pin_path.join(pin)).collect(),
        has_flows: request.has_flows,
        is_fresh: !adopted,
    };
    if waits {
        return Ok((bpf, interfaces, Some(takeover)));
    }
    takeover.settle()?;
    Ok((bpf, interfaces, None))
}

/// Unpins the counters of a build that knew fewer reasons: new ones would not be counted. They begin anew.
fn renew_reasons(home: &Home) -> Result<(), DataplaneError> {
    let path = home.path.join(names::REASONS);
    if !path.exists() {
        return Ok(());
    }
    let map = |source| DataplaneError::Map { map: names::REASONS, source };
    let pinned = MapData::from_pin(&path).and_then(|data| data.info()).map_err(map)?;
    if pinned.max_entries() < Reason::COUNT { pins::remove(&path) } else { Ok(()) }
}

fn load(request: &Request<'_>, home: &Home) -> Result<Ebpf, DataplaneError> {
    renew_reasons(home)?;
    let refuse = |source| DataplaneError::Load { program: request.program, source };
    let mut loader = EbpfLoader::new();
    loader.override_global(names::SETTINGS, request.settings, true).override_global(
        names::LOG_LEVEL,
        &request.log_level,
        true,
    );
    for (map, size) in request.sizes {
        loader.map_max_entries(map, *size);
    }
    for map in request.maps {
        loader.map_pin_path(map, home.path.join(map));
    }
    for (map, pin) in request.shared {
        loader.map_pin_path(map, request.pin_path.join(pin));
    }
    let mut bpf =
        loader.load(request.object).map_err(|e| denied("create the maps", &e).unwrap_or(refuse(e.into())))?;
    let program = program_mut(&mut bpf, request.program);
    program.load().map_err(|source| refused(request.program, source))?;
    stages::fill(&mut bpf, request.stages)?;
    if let Some(name) = request.chained {
        stages::load(&mut bpf, name)?;
    }
    Ok(bpf)
}

/// Why the kernel did not take a program.
pub fn refused(program: &'static str, source: ProgramError) -> DataplaneError {
    denied("load the program", &source).unwrap_or(DataplaneError::Load { program, source: source.into() })
}

/// The error for a lack of privileges, if that is what it was.
fn denied(what: &'static str, error: &(dyn std::error::Error + 'static)) -> Option<DataplaneError> {
    let mut cause = Some(error);
    while let Some(e) = cause {
        if let Some(io) = e.downcast_ref::<io::Error>() {
            return (io.raw_os_error() == Some(libc::EPERM)).then_some(DataplaneError::Denied { what });
        }
        cause = e.source();
    }
    None
}

/// A program that the object is known to have.
pub fn program_mut<'a>(bpf: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    let program = bpf.program_mut(name).expect("the object was built with this program");
    program.try_into().expect("it is an XDP program")
}

/// A handle of one that is loaded.
fn program_fd(bpf: &Ebpf, name: &'static str) -> Result<ProgramFd, DataplaneError> {
    let program = bpf.program(name).expect("the object was built with this program");
    let program: &Xdp = program.try_into().expect("it is an XDP program");
    let fd = program.fd().expect("loaded before").try_clone();
    fd.map_err(|source| DataplaneError::Load { program: name, source: source.into() })
}

/// Programs to pin: that under the links, and the one that flows which another version takes over are asked of.
fn programs_of(request: &Request<'_>) -> Vec<&'static str> {
    let mut all = vec![request.program];
    all.extend(request.chained);
    all
}

/// Pins the programs, so that it can be told whose program runs under a link, and for tools. Where an earlier daemon's
/// still runs, its pins stay until the links have changed ([`Takeover::settle`]).
fn pin_programs(request: &Request<'_>, bpf: &Ebpf, home: &Home, adopted: bool) -> Result<(), DataplaneError> {
    for name in programs_of(request) {
        let path = home.path.join(format!("program-{name}"));
        let path = if adopted { pins::next(&path) } else { path };
        if path.exists() {
            pins::remove(&path)?;
        }
        let pin = |source| DataplaneError::Pin { what: "cannot pin program", path: path.clone(), source };
        super::sys::pin(&program_fd(bpf, name)?, &path).map_err(pin)?;
    }
    Ok(())
}

/// Notes in `home` that its start is complete, and beside the links that it is the live one.
pub fn set_abi(pin_path: &Path, home: &Home) -> Result<(), DataplaneError> {
    let map = |source| DataplaneError::Map { map: names::ABI, source };
    let data = MapData::from_pin(home.path.join(names::ABI)).map_err(map)?;
    let mut abi: Array<MapData, u32> = Array::try_from(Map::Array(data)).map_err(map)?;
    abi.set(0, ABI_VERSION, 0).map_err(map)?;
    let data = MapData::from_pin(home.path.join(names::ABI)).map_err(map)?;
    pins::replace(data.fd(), &pin_path.join(names::ABI))
}

/// Takes a map that the object is known to have.
pub fn take<M: TryFrom<Map, Error = MapError>>(
    bpf: &mut Ebpf,
    name: &'static str,
) -> Result<M, DataplaneError> {
    let map = bpf.take_map(name).expect("names are those that the object was built with");
    M::try_from(map).map_err(|source| DataplaneError::Map { map: name, source })
}
