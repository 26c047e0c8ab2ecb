//! Fills an object's `STAGES`: the programs that its first program jumps to; and our place in `CHAIN`.
//!
//! The maps are pinned with the others, which also keeps what is in them: a prog array is emptied when nobody
//! holds or pins it any more. A new daemon puts its stages there before it replaces the program under the
//! links, so that no program of ours meets an empty place. Another's places are never touched.

use super::{
    DataplaneError,
    attach::{program_mut, refused},
};
use aya::{Ebpf, maps::ProgramArray, programs::ProgramFd};
use lb_common::names;

/// Loads the programs of `stages` (name, place) and puts them in their places.
pub fn fill(bpf: &mut Ebpf, stages: &[(&'static str, u32)]) -> Result<(), DataplaneError> {
    let mut programs = Vec::with_capacity(stages.len());
    for (name, place) in stages {
        programs.push((*place, load(bpf, name)?));
    }
    put(bpf, names::STAGES, &programs)
}

/// Makes `program` the one that users' programs go on to.
pub fn chain(bpf: &mut Ebpf, program: Option<&'static str>) -> Result<(), DataplaneError> {
    match program {
        Some(name) => {
            let program = handle(bpf, name)?;
            put(bpf, names::CHAIN, &[(names::stage::INGRESS, program)])
        }
        None => Ok(()),
    }
}

fn put(bpf: &mut Ebpf, map: &'static str, programs: &[(u32, ProgramFd)]) -> Result<(), DataplaneError> {
    if programs.is_empty() {
        return Ok(());
    }
    let error = |source| DataplaneError::Map { map, source };
    let places = bpf.map_mut(map).expect("an object with stages has the map");
    let mut places = ProgramArray::try_from(places).map_err(error)?;
    programs.iter().try_for_each(|(place, fd)| places.set(*place, fd, 0).map_err(error))
}

/// Loads a program.
pub fn load(bpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, DataplaneError> {
    program_mut(bpf, name).load().map_err(|source| refused(name, source))?;
    handle(bpf, name)
}

fn handle(bpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, DataplaneError> {
    let fd = program_mut(bpf, name).fd().expect("loaded before").try_clone();
    fd.map_err(|source| DataplaneError::Load { program: name, source: source.into() })
}
