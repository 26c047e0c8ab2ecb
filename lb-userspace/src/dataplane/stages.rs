//! Fills an object's `STAGES`: the programs that its first program jumps to.
//!
//! The map is pinned with the others, which also keeps what is in it: a prog array is emptied when nobody
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
    if programs.is_empty() {
        return Ok(());
    }
    let map = |source| DataplaneError::Map { map: names::STAGES, source };
    let places = bpf.map_mut(names::STAGES).expect("an object with stages has the map");
    let mut places = ProgramArray::try_from(places).map_err(map)?;
    programs.iter().try_for_each(|(place, fd)| places.set(*place, fd, 0).map_err(map))
}

fn load(bpf: &mut Ebpf, name: &'static str) -> Result<ProgramFd, DataplaneError> {
    let program = program_mut(bpf, name);
    program.load().map_err(|source| refused(name, source))?;
    let fd = program.fd().expect("loaded above").try_clone();
    fd.map_err(|source| DataplaneError::Load { program: name, source: source.into() })
}
