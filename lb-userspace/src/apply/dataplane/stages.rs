//! Fills an object's `STAGES`, the programs that its first program tail calls, and our entry in `DISPATCHER`.
//!
//! The maps are pinned with the others, which also keeps their contents: a program array is emptied when nobody
//! holds or pins it any more. A new daemon fills in its stages before it replaces the program under the
//! links, so that no program of ours meets an empty entry. Entries of users' programs are never changed.
//!
//! A stage that the kernel refuses is left out with the features that need it; the rest runs.

use super::{DataplaneError, attach::program_mut, load::refused};
use aya::{Ebpf, maps::ProgramArray, programs::ProgramFd};
use lb_common::{
    names,
    settings::features::{self, FRAGMENTS, ICMP, NAT, QUIC, REJECT},
};
use serde::Serialize;

/// A program that is not loaded because the kernel refused it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RefusedProgram {
    /// Name of the program.
    pub program: &'static str,
    /// Feature that is switched off without it; 0 if the host's stack does its work instead.
    pub feature: u32,
    /// Reason, in one sentence.
    pub reason: String,
}

impl RefusedProgram {
    /// Name of the feature in settings, or name of the program if no feature is switched off.
    pub fn feature_name(&self) -> &'static str {
        features::NAMES.iter().find(|(_, bit)| *bit == self.feature).map_or(self.program, |(name, _)| name)
    }
}

/// Features that need a stage's program, and the feature that is switched off without it.
fn needed_for(program: &str) -> (u32, u32) {
    match program {
        "icmp" => (ICMP, ICMP),
        "fragment" => (FRAGMENTS, FRAGMENTS),
        "nat" | "nat_bind" | "nat_error" => (NAT, NAT),
        // Without it, fragments of flows in mode nat go to the host.
        "nat_fragment" => (NAT, 0),
        "quic" => (QUIC, QUIC),
        "reject" => (REJECT, REJECT),
        _ => (features::ALL, 0),
    }
}

/// Loaded programs with their indices, and those that the kernel refused.
#[derive(Default)]
pub struct Stages {
    programs: Vec<(u32, ProgramFd)>,
    /// Programs that the kernel refused.
    pub left_out: Vec<RefusedProgram>,
}

impl Stages {
    /// Loads those of `stages` (name, index) that the features need. An error other than a refusal is returned.
    pub fn load(
        bpf: &mut Ebpf,
        stages: &[(&'static str, u32)],
        features: u32,
    ) -> Result<Self, DataplaneError> {
        let mut all = Self::default();
        for (program, place) in stages {
            let (needed, feature) = needed_for(program);
            if needed & features == 0 {
                continue;
            }
            match load(bpf, program) {
                Ok(fd) => all.programs.push((*place, fd)),
                Err(error @ DataplaneError::Verifier { .. }) => {
                    all.left_out.push(RefusedProgram { program, feature, reason: error.to_string() });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// Features that are unavailable.
    pub fn lost(&self) -> u32 {
        self.left_out.iter().fold(0, |bits, one| bits | one.feature)
    }

    /// Stores the programs in their array.
    pub fn put(&self, bpf: &mut Ebpf) -> Result<(), DataplaneError> {
        put(bpf, names::STAGES, &self.programs)
    }
}

/// Makes `program` the one that users' programs tail call.
pub fn chain(bpf: &mut Ebpf, program: Option<&'static str>) -> Result<(), DataplaneError> {
    match program {
        Some(name) => {
            let program = handle(bpf, name)?;
            put(bpf, names::DISPATCHER, &[(names::stage::INGRESS, program)])
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_stage_of_ours_is_needed_for_a_feature() {
        for (program, _) in names::stage::INGRESS_PROGRAMS {
            let (needed, feature) = needed_for(program);
            assert_eq!(needed.count_ones(), 1, "{program}");
            assert!(feature == needed || (feature == 0 && program == "nat_fragment"), "{program}");
        }
        let (needed, feature) = needed_for(names::stage::DECAP_PROGRAMS[0].0);
        assert_eq!((needed, feature), (features::ALL, 0), "a worker has no features");
    }

    #[test]
    fn what_is_left_out_has_the_name_of_its_feature() {
        let left_out = |program, feature| RefusedProgram { program, feature, reason: String::new() };
        assert_eq!(left_out("nat_bind", NAT).feature_name(), "nat");
        assert_eq!(left_out("nat_fragment", 0).feature_name(), "nat_fragment");
    }
}
