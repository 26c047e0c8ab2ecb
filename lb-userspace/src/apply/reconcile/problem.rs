//! Services that are not as they are wanted.

use super::NoRoom;
use crate::{
    desired::model::Name,
    plan::compile::{CompileError, Compiled},
};
use std::collections::BTreeMap;

/// Why a service is not as it is wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It waits for slots. It keeps its table meanwhile, if it has one; who takes no new flows is taken out of it.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// It cannot be compiled, or not all of it.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

impl Problem {
    /// For metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::NoRoom(_) => "no_room",
            Self::Compile(_) => "not_compiled",
        }
    }
}

/// Everything that is not as it is wanted.
pub(super) fn all(
    compiled: &Compiled,
    waiting: BTreeMap<Name, NoRoom>,
    lacks: &BTreeMap<u32, NoRoom>,
) -> BTreeMap<Name, Problem> {
    let failed = compiled.failed.iter().map(|(name, error)| (name.clone(), error.clone().into()));
    let lacking =
        compiled.status.iter().filter_map(|s| Some((s.name.clone(), (*lacks.get(&s.index)?).into())));
    let waiting = waiting.into_iter().map(|(name, lack)| (name, lack.into()));
    failed.chain(lacking).chain(waiting).collect()
}
