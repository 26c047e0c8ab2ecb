//! Loads a program with its maps pinned, and attaches it to interfaces by pinned links.
//!
//! Pins outlive the daemon: forwarding goes on without it. A new daemon reuses the maps and replaces
//! the program under each link in one step (`BPF_LINK_UPDATE`), so that every packet meets a program. Where objects of
//! another ABI version run, the daemon loads its own beside them, and a [`Takeover`] switches once the tables are written.

use super::{
    DataplaneError,
    kernel::KernelFeatures,
    layout::{Layout, write_own},
    links::{self, AttachedInterface, GENERIC, XdpLink},
    load::{LoadedObject, Switches, load},
    pins::{self, Home},
    stages::{self, RefusedProgram},
    takeover::{self, Predecessor, Takeover},
    variant::{self, ArrayPin, Situation},
};
use aya::{
    Ebpf,
    maps::{Array, Map, MapData, MapError},
    programs::{ProgramFd, Xdp},
};
use lb_common::{ABI_VERSION, names};
use std::{
    collections::BTreeSet,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// Program to load, and where to attach it.
pub struct Request<'a> {
    /// BPF object.
    pub object: &'static [u8],
    /// Name of the program in the object.
    pub program: &'static str,
    /// Programs that it tail calls, and their indices in `STAGES`.
    pub stages: &'a [(&'static str, u32)],
    /// Program that users' programs before it tail call.
    pub chained: Option<&'static str>,
    /// Maps to pin.
    pub maps: &'a [&'static str],
    /// Program arrays that all ABI versions share, and names of their pins.
    pub shared: &'a [(&'static str, &'static str)],
    /// Whether its maps hold flows, which must survive a change of the ABI version.
    pub has_flows: bool,
    /// Map sizes that differ from the object's.
    pub sizes: &'a [(&'static str, u32)],
    /// Features in use, of `lb_common::settings::features`.
    pub features: u32,
    /// Bytes of the settings global, for what the kernel supports.
    pub settings: &'a dyn Fn(Switches) -> Vec<u8>,
    /// Log level of aya-log.
    pub log_level: u8,
    /// Directory of the pins, on a BPF filesystem.
    pub pin_path: &'a Path,
    /// Names of the interfaces.
    pub interfaces: &'a [String],
    /// Whether generic mode may be used where the driver does not support XDP.
    pub allow_generic: bool,
}

/// Result of [`attach`].
pub struct Attached {
    /// The loaded object.
    pub bpf: Ebpf,
    /// Interfaces that it runs on, or will once the other ABI version's flows are taken over.
    pub interfaces: Vec<AttachedInterface>,
    /// Interfaces that it does not run on yet, with the error of each.
    pub waiting: Vec<(String, DataplaneError)>,
    /// Whether it is loaded with the frags flag.
    pub frags: bool,
    /// Programs that the kernel refused.
    pub left_out: Vec<RefusedProgram>,
    /// Whether maps of an earlier daemon were taken over.
    pub adopted: bool,
    /// Directory in which its maps are pinned.
    pub home: PathBuf,
    /// Takeover to finish once the tables are written.
    pub takeover: Option<Takeover>,
    /// Lock that keeps other daemons out while it is held.
    pub lock: fs::File,
}

/// Creates the pin directory, checks its contents, loads and attaches. An interface that does not exist is waited for, even
/// if no other exists either: it may appear later.
pub fn attach(request: &Request<'_>) -> Result<Attached, DataplaneError> {
    if request.object.is_empty() {
        return Err(DataplaneError::NoPrograms);
    }
    let (mut present, mut waiting) = (Vec::new(), Vec::new());
    for name in request.interfaces {
        match links::index_of(name) {
            Ok(ifindex) => present.push((name.as_str(), ifindex)),
            Err(error) => waiting.push((name.clone(), error)),
        }
    }
    let is_new = pins::make_directory(request.pin_path)?;
    let lock = pins::lock(request.pin_path)?;
    let result = attach_locked(request, &present, waiting, lock);
    if is_new && result.is_err() {
        // A refused first start leaves nothing behind; a directory that others use is not empty, and stays.
        let _ = fs::remove_dir(request.pin_path);
    }
    result
}

/// Interfaces that exist: names and indices.
type Present<'a> = [(&'a str, u32)];

fn attach_locked(
    request: &Request<'_>,
    present: &Present<'_>,
    waiting: Vec<(String, DataplaneError)>,
    lock: fs::File,
) -> Result<Attached, DataplaneError> {
    let home = Home::ours(request.pin_path);
    let (adopted, others) = find_homes(request, &home)?;
    // Before anything is created, so that objects that cannot be read are left alone.
    let predecessors = others.iter().map(|other| open(request, other)).collect::<Result<Vec<_>, _>>()?;
    match load_and_attach(request, present, &home, adopted, predecessors) {
        Ok(Started { loaded, interfaces, failed, takeover }) => {
            let LoadedObject { bpf, frags, left_out, .. } = loaded;
            let waiting = waiting.into_iter().chain(failed).collect();
            let home = home.path;
            Ok(Attached { bpf, interfaces, waiting, frags, left_out, adopted, home, takeover, lock })
        }
        Err(error) => {
            // A failed first start leaves nothing behind; objects that ran before stay as they were.
            if !adopted && others.is_empty() {
                pins::remove_all(request.pin_path)?;
            } else if !adopted {
                home.remove()?;
            }
            Err(error)
        }
    }
}

/// Loads the program again over the present maps, and replaces it under each link in one step. On failure the
/// old program stays. Returns none while another ABI version's program still forwards. `frags`: flag of the loaded program.
pub fn replace(request: &Request<'_>, frags: bool) -> Result<Option<Ebpf>, DataplaneError> {
    let home = Home::ours(request.pin_path);
    if is_other_running(request.pin_path, &home)? {
        return Ok(None);
    }
    let LoadedObject { mut bpf, .. } = load(request, &home, frags)?;
    pin_programs(request, &bpf, &home, true)?;
    stages::chain(&mut bpf, request.chained)?;
    for name in request.interfaces {
        // An interface that is gone is attached to again when it is back.
        let Ok(ifindex) = links::index_of(name) else { continue };
        if let Some(link) = links::find(request.pin_path, name, ifindex)? {
            link.update(&program_fd(&bpf, request.program)?)?;
        }
    }
    for name in programs_of(request) {
        pins::replace(&program_fd(&bpf, name)?, &program_path(&home, name))?;
    }
    Ok(Some(bpf))
}

/// Path of the pin of one of our programs.
fn program_path(home: &Home, name: &str) -> PathBuf {
    home.path.join(format!("program-{name}"))
}

/// Whether another ABI version's program runs under our links. Without objects of another version, a program that is not
/// ours is somebody else's, under a link that they changed.
fn is_other_running(pin_path: &Path, home: &Home) -> Result<bool, DataplaneError> {
    let running = links::programs(pin_path)?;
    let is_ours = running.is_empty() || !home.programs().is_disjoint(&running);
    Ok(!is_ours && !Home::others(pin_path)?.is_empty())
}

/// Ids of the programs of all ABI versions that are pinned.
pub fn pinned_programs(pin_path: &Path) -> Result<BTreeSet<u32>, DataplaneError> {
    if !pin_path.exists() {
        return Ok(BTreeSet::new());
    }
    let homes = Home::others(pin_path)?.into_iter().chain([Home::ours(pin_path)]);
    Ok(homes.flat_map(|home| home.programs()).collect())
}

/// Returns our program, for a link; none while another ABI version's program runs. Where all interfaces are gone, it is
/// the program that was pinned last.
pub fn running(pin_path: &Path, program: &str) -> Result<Option<OwnedFd>, DataplaneError> {
    let home = Home::ours(pin_path);
    if is_other_running(pin_path, &home)? {
        return Ok(None);
    }
    let path = program_path(&home, program);
    let pin = |source| DataplaneError::Pin { what: "cannot open program", path: path.clone(), source };
    super::sys::open(&path).map(Some).map_err(pin)
}

/// Finds out whether objects of this ABI version can be reused, and which others must be taken over.
/// Removes the remains of unfinished starts.
fn find_homes(request: &Request<'_>, home: &Home) -> Result<(bool, Vec<Home>), DataplaneError> {
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
        // The version that runs may have been killed before it had copied all flows from here: it still sends packets of
        // flows that it does not know to the program of this home.
        let is_needed = |other: &Home| Ok(runs(other) && takeover::is_on(other)?);
        let unfinished = others.iter().map(is_needed).collect::<Result<Vec<bool>, DataplaneError>>()?;
        if home.exists() && unfinished.contains(&true) {
            others.push(home.clone().set_aside()?);
        } else {
            home.remove()?;
        }
    } else if is_done && !others.iter().any(runs) {
        // Their flows have been taken over; only their removal was interrupted.
        others.drain(..).try_for_each(|other| other.remove())?;
    }
    // The running version last, because the later entries take precedence; those that were set aside are older than any.
    others.sort_by_key(|other| (runs(other), other.aside == 0, other.abi, other.aside));
    Ok((adopted, others))
}

/// Opens another version's objects, as far as needed.
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

/// Result of a successful start.
struct Started {
    loaded: LoadedObject,
    interfaces: Vec<AttachedInterface>,
    /// Interfaces whose drivers refuse the program.
    failed: Vec<(String, DataplaneError)>,
    takeover: Option<Takeover>,
}

/// Result of attaching to interfaces without a link of ours.
enum New {
    Done {
        interfaces: Vec<AttachedInterface>,
        failed: Vec<(String, DataplaneError)>,
    },
    /// An interface needs generic mode, so all programs must be loaded without frags.
    WithoutFrags,
}

fn load_and_attach(
    request: &Request<'_>,
    present: &Present<'_>,
    home: &Home,
    adopted: bool,
    predecessors: Vec<Predecessor>,
) -> Result<Started, DataplaneError> {
    home.create()?;
    let mut found = Vec::new();
    for (name, ifindex) in present {
        found.push(links::find(request.pin_path, name, *ifindex)?);
    }
    let situation = situation(request, present, &found, (home, &predecessors));
    let missing: Vec<(&str, u32)> =
        present.iter().zip(&found).filter(|(_, link)| link.is_none()).map(|(one, _)| *one).collect();
    let has_links = found.iter().any(Option::is_some);
    let load = |frags| -> Result<LoadedObject, DataplaneError> {
        let mut loaded = load(request, home, frags)?;
        if request.has_flows {
            write_own(&mut loaded.bpf)?;
        }
        pin_programs(request, &loaded.bpf, home, adopted)?;
        Ok(loaded)
    };
    let mut loaded = load(situation.choose())?;
    let new = match attach_new(request, &loaded, &missing, has_links)? {
        New::WithoutFrags => {
            tracing::info!(
                "loading the program again without frags, because an interface needs generic mode"
            );
            loaded.arrays.iter().for_each(ArrayPin::undo);
            loaded = load(false)?;
            attach_new(request, &loaded, &missing, has_links)?
        }
        done => done,
    };
    let New::Done { interfaces: new, failed } = new else {
        unreachable!("without frags, generic mode needs nothing else")
    };
    let started = finish_start(request, home, adopted, (&mut loaded, predecessors), found, &new);
    match started {
        Ok((interfaces, takeover)) => Ok(Started { loaded, interfaces, failed, takeover }),
        Err(error) => {
            undo(request, &new, &loaded);
            Err(error)
        }
    }
}

/// Undoes what a failed start has attached and created.
fn undo(request: &Request<'_>, new: &[AttachedInterface], loaded: &LoadedObject) {
    for interface in new {
        if let Err(error) = links::detach(request.pin_path, interface) {
            tracing::warn!(%error, "cannot detach after a failed start; the link is left behind");
        }
    }
    loaded.arrays.iter().for_each(ArrayPin::undo);
}

/// Gathers the facts that decide for or against frags. Facts that cannot be determined count as absent.
fn situation(
    request: &Request<'_>,
    present: &Present<'_>,
    found: &[Option<XdpLink>],
    (home, predecessors): (&Home, &[Predecessor]),
) -> Situation {
    let or_unknown = |result: io::Result<Option<bool>>| {
        result.unwrap_or_else(|error| {
            tracing::warn!(%error, "cannot determine whether a loaded program has frags");
            None
        })
    };
    let users = request.chained.and_then(|_| {
        let arrays = request.shared.iter().map(|(_, pin)| request.pin_path.join(pin));
        arrays.filter_map(|path| or_unknown(variant::of_users(&path))).next()
    });
    let homes = predecessors.iter().map(Predecessor::home).chain([home]);
    let ids = links::programs(request.pin_path).unwrap_or_default();
    let running = homes.filter_map(|home| home.program_of(&ids)).next();
    let running = running.and_then(|program| or_unknown(variant::of_program(&program).map(Some)));
    Situation {
        kernel_has: KernelFeatures::get().frags,
        mtu: links::largest_mtu(present.iter().map(|(name, _)| *name)),
        is_generic: found.iter().flatten().any(|link| link.interface.mode == GENERIC),
        users,
        running,
    }
}

/// Attaches to interfaces that have no link of ours. Interfaces whose drivers refuse the program are left for later, if
/// there are others.
fn attach_new(
    request: &Request<'_>,
    loaded: &LoadedObject,
    missing: &Present<'_>,
    has_links: bool,
) -> Result<New, DataplaneError> {
    let program = program_fd(&loaded.bpf, request.program)?;
    let (mut interfaces, mut failed) = (Vec::new(), Vec::new());
    for &(name, ifindex) in missing {
        let allow_generic = request.allow_generic && !loaded.frags;
        match links::attach(request.pin_path, &program, name, ifindex, allow_generic) {
            Ok(interface) => interfaces.push(interface),
            Err(DataplaneError::NotTaken { .. }) if request.allow_generic && loaded.frags => {
                for interface in &interfaces {
                    links::detach(request.pin_path, interface)?;
                }
                let users = request.shared.iter().map(|(_, pin)| request.pin_path.join(pin));
                let users = users.filter(|path| request.chained.is_some() && path.exists());
                if let Some(path) =
                    users.into_iter().find(|path| matches!(variant::of_users(path), Ok(Some(_))))
                {
                    return Err(DataplaneError::GenericFrags { interface: name.to_owned(), path });
                }
                return Ok(New::WithoutFrags);
            }
            Err(error) if error.is_of_interface() => failed.push((name.to_owned(), error)),
            Err(error) => {
                undo(request, &interfaces, loaded);
                return Err(error);
            }
        }
    }
    if interfaces.is_empty() && !has_links && !failed.is_empty() {
        loaded.arrays.iter().for_each(ArrayPin::undo);
        return Err(failed.remove(0).1);
    }
    Ok(New::Done { interfaces, failed })
}

/// Starts the program: under the present links, and at its index in the users' array.
fn finish_start(
    request: &Request<'_>,
    home: &Home,
    adopted: bool,
    (loaded, predecessors): (&mut LoadedObject, Vec<Predecessor>),
    found: Vec<Option<XdpLink>>,
    new: &[AttachedInterface],
) -> Result<(Vec<AttachedInterface>, Option<Takeover>), DataplaneError> {
    let must_wait = !predecessors.is_empty();
    if !must_wait {
        stages::chain(&mut loaded.bpf, request.chained)?;
    }
    let program = program_fd(&loaded.bpf, request.program)?;
    let (mut interfaces, mut pending) = (new.to_vec(), Vec::new());
    for link in found.into_iter().flatten() {
        interfaces.push(link.interface.clone());
        if must_wait {
            pending.push(link);
        } else {
            // The program changes under the link in one step; the old one runs until then.
            link.update(&program)?;
        }
    }
    let order = |i: &AttachedInterface| request.interfaces.iter().position(|name| *name == i.name);
    interfaces.sort_by_key(order);
    let mut takeover = Takeover {
        pin_path: request.pin_path.to_owned(),
        home: home.clone(),
        predecessors,
        interfaces: request.interfaces.to_vec(),
        links: pending,
        programs: programs_of(request),
        program,
        chained: request.chained.map(|name| program_fd(&loaded.bpf, name)).transpose()?,
        arrays: std::mem::take(&mut loaded.arrays),
        shared: loaded.shared,
        has_flows: request.has_flows,
        is_fresh: !adopted,
    };
    if must_wait {
        return Ok((interfaces, Some(takeover)));
    }
    takeover.settle()?;
    Ok((interfaces, None))
}

/// Returns a program that the object is known to have.
pub fn program_mut<'a>(bpf: &'a mut Ebpf, name: &str) -> &'a mut Xdp {
    let program = bpf.program_mut(name).expect("the object was built with this program");
    program.try_into().expect("it is an XDP program")
}

/// Returns a handle of a loaded program.
fn program_fd(bpf: &Ebpf, name: &'static str) -> Result<ProgramFd, DataplaneError> {
    let program = bpf.program(name).expect("the object was built with this program");
    let program: &Xdp = program.try_into().expect("it is an XDP program");
    let fd = program.fd().expect("loaded before").try_clone();
    fd.map_err(|source| DataplaneError::Load { program: name, source: source.into() })
}

/// Programs to pin: the one under the links, and the one that users' programs tail call.
fn programs_of(request: &Request<'_>) -> Vec<&'static str> {
    let mut all = vec![request.program];
    all.extend(request.chained);
    all
}

/// Pins the programs, for tools, and so that the owner of the program under a link can be determined. While an earlier
/// daemon's program still runs, its pins stay until the links have changed ([`Takeover::settle`]).
fn pin_programs(request: &Request<'_>, bpf: &Ebpf, home: &Home, adopted: bool) -> Result<(), DataplaneError> {
    for name in programs_of(request) {
        let path = program_path(home, name);
        let path = if adopted { pins::next(&path) } else { path };
        if path.exists() {
            pins::remove(&path)?;
        }
        let pin = |source| DataplaneError::Pin { what: "cannot pin program", path: path.clone(), source };
        super::sys::pin(&program_fd(bpf, name)?, &path).map_err(pin)?;
    }
    Ok(())
}

/// Records in `home` that its start is complete, and beside the links that it is the live one.
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
