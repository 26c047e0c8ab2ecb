//! Loads an object with all programs that the kernel accepts.
//!
//! A stage that the kernel refuses is left out, and its feature is switched off in the other programs. Of the first
//! program, parts are left out until the kernel accepts it.

use super::{
    DataplaneError,
    attach::Request,
    kernel::KernelFeatures,
    object::{self, Object},
    pins::{self, Home},
    refused::{self, VerifierVerdict},
    stages::{self, RefusedProgram, Stages},
    variant::ArrayPin,
};
use aya::{Ebpf, EbpfLoader, maps::MapData, programs::ProgramError};
use lb_common::{Reason, names, settings::features};
use std::{collections::BTreeSet, io};

/// Settings that depend on the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switches {
    /// Bits of `lb_common::settings::kernel`.
    pub kernel: u32,
    /// Features that are available.
    pub features: u32,
}

/// A loaded object.
pub struct LoadedObject {
    /// The object.
    pub bpf: Ebpf,
    /// Whether it is loaded with the frags flag.
    pub frags: bool,
    /// Programs that the kernel refused.
    pub left_out: Vec<RefusedProgram>,
    /// Program arrays of the object: the shared ones, then its own.
    pub arrays: Vec<ArrayPin>,
    /// Number of shared arrays.
    pub shared: usize,
}

/// Loads the object with all programs that the kernel accepts: the feature of a refused program is switched off in the
/// others.
pub fn load(request: &Request<'_>, home: &Home, frags: bool) -> Result<LoadedObject, DataplaneError> {
    let mut left_out: Vec<RefusedProgram> = Vec::new();
    let mut features = request.features;
    let shared = request.shared.iter().map(|(_, pin)| request.pin_path.join(pin));
    let arrays = shared.chain([home.path.join(names::STAGES)]);
    let arrays = arrays.map(|path| ArrayPin::of(path, frags)).collect::<Result<Vec<_>, _>>()?;
    loop {
        let mut bpf = load_object(
            request,
            home,
            Switches { kernel: KernelFeatures::get().bits(frags), features },
            &arrays,
        )?;
        let stages = Stages::load(&mut bpf, request.stages, features)?;
        let lost = stages.lost();
        let known: BTreeSet<&str> = left_out.iter().map(|one| one.program).collect();
        let more: Vec<RefusedProgram> =
            stages.left_out.iter().filter(|one| !known.contains(one.program)).cloned().collect();
        left_out.extend(more);
        if lost & features != 0 {
            features &= !lost;
            continue;
        }
        if let Err(error) = stages::load(&mut bpf, request.program) {
            let less = leave_out(request, home, (frags, &arrays), features, error)?;
            features = less.iter().fold(features, |bits, one| bits & !one.feature);
            left_out.extend(less);
            continue;
        }
        if let Some(name) = request.chained {
            stages::load(&mut bpf, name)?;
        }
        stages.put(&mut bpf)?;
        return Ok(LoadedObject { bpf, frags, left_out, arrays, shared: request.shared.len() });
    }
}

/// Optional parts of the first program, the longest first.
const PARTS: [u32; 9] = [
    features::SECOND_CHANCE,
    features::P2C,
    features::RATE,
    features::QUIC,
    features::FRAGMENTS,
    features::ICMP,
    features::NAT,
    features::L2,
    features::LOCAL,
];

/// Finds the fewest parts, in order, without which the kernel accepts the first program that it has refused. Returns the
/// error itself where no part helps, or where it has another cause.
fn leave_out(
    request: &Request<'_>,
    home: &Home,
    (frags, arrays): (bool, &[ArrayPin]),
    features: u32,
    error: DataplaneError,
) -> Result<Vec<RefusedProgram>, DataplaneError> {
    let settings =
        |features| (request.settings)(Switches { kernel: KernelFeatures::get().bits(frags), features });
    let has_parts = settings(0) != settings(features);
    if !has_parts || !matches!(error, DataplaneError::Verifier { .. }) {
        return Err(error);
    }
    let (mut less, mut rest) = (Vec::new(), features);
    for part in PARTS.into_iter().filter(|part| features & part != 0) {
        rest &= !part;
        less.push(RefusedProgram { program: request.program, feature: part, reason: error.to_string() });
        let switches = Switches { kernel: KernelFeatures::get().bits(frags), features: rest };
        let mut bpf = load_object(request, home, switches, arrays)?;
        match stages::load(&mut bpf, request.program) {
            Ok(_) => return Ok(less),
            Err(DataplaneError::Verifier { .. }) => {}
            Err(other) => return Err(other),
        }
    }
    Err(error)
}

/// Unpins the counters of a build with fewer reasons, which have no room for the new ones; counting restarts at zero.
fn renew_reasons(home: &Home) -> Result<(), DataplaneError> {
    let path = home.path.join(names::REASONS);
    if !path.exists() {
        return Ok(());
    }
    let map = |source| DataplaneError::Map { map: names::REASONS, source };
    let pinned = MapData::from_pin(&path).and_then(|data| data.info()).map_err(map)?;
    if pinned.max_entries() < Reason::COUNT { pins::remove(&path) } else { Ok(()) }
}

/// Creates or opens the maps; the programs are not loaded yet. `arrays`: the shared ones in their order, then ours.
fn load_object(
    request: &Request<'_>,
    home: &Home,
    switches: Switches,
    arrays: &[ArrayPin],
) -> Result<Ebpf, DataplaneError> {
    renew_reasons(home)?;
    let refuse = |source| DataplaneError::Load { program: request.program, source };
    let settings = (request.settings)(switches);
    let object = if switches.kernel & lb_common::settings::kernel::FRAGS == 0 {
        object::without_frags(request.object)
    } else {
        None
    };
    let object = object.as_ref().map_or(request.object, Object::bytes);
    let mut loader = EbpfLoader::new();
    loader.override_global(names::SETTINGS, settings.as_slice(), true).override_global(
        names::LOG_LEVEL,
        &request.log_level,
        true,
    );
    for (map, size) in request.sizes {
        loader.map_max_entries(map, *size);
    }
    for map in request.maps.iter().filter(|map| **map != names::STAGES) {
        loader.map_pin_path(map, home.path.join(map));
    }
    let maps = request.shared.iter().map(|(map, _)| *map).chain([names::STAGES]);
    for (map, array) in maps.zip(arrays) {
        loader.map_pin_path(map, &array.used);
    }
    loader.load(object).map_err(|e| denied("create the maps", &e).unwrap_or(refuse(e.into())))
}

/// Builds the error for a program that the kernel refused.
pub fn refused(program: &'static str, source: ProgramError) -> DataplaneError {
    if let Some(denied) = denied("load the program", &source) {
        return denied;
    }
    if !matches!(source, ProgramError::LoadError { .. }) {
        return DataplaneError::Load { program, source: source.into() };
    }
    let VerifierVerdict { reason, log } = refused::examine(program, &source);
    DataplaneError::Verifier { kernel: refused::kernel_release(), program, reason, log }
}

/// The error for missing privileges, if that is the cause.
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
