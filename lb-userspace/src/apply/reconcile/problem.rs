//! Services that differ from the desired state.

use super::NoRoom;
use crate::{
    desired::model::Name,
    plan::compile::{CompileError, Compiled},
};
use std::collections::BTreeMap;

/// Why a service differs from the desired state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The service waits for slots. It keeps its table, if it has one, without backends that take no new flows.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// The service cannot be compiled, or not completely.
    #[error(transparent)]
    Compile(#[from] CompileError),
}

impl Problem {
    /// Label in metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::NoRoom(_) => "no_room",
            Self::Compile(_) => "not_compiled",
        }
    }
}

/// Collects the problems of all services.
pub(super) fn collect(
    compiled: &Compiled,
    waiting: BTreeMap<Name, NoRoom>,
    shortages: &BTreeMap<u32, NoRoom>,
) -> BTreeMap<Name, Problem> {
    let failed = compiled.failed.iter().map(|(name, error)| (name.clone(), error.clone().into()));
    let short_of_room =
        compiled.status.iter().filter_map(|s| Some((s.name.clone(), (*shortages.get(&s.index)?).into())));
    let waiting = waiting.into_iter().map(|(name, shortage)| (name, shortage.into()));
    failed.chain(short_of_room).chain(waiting).collect()
}
