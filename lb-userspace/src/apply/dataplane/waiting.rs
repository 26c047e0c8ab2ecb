//! Interfaces that the program runs on, and those that wait for it: missing when lbd started, removed since, or
//! with a driver that refused the program. They are retried while lbd runs.

use super::{AttachOptions, AttachedInterface, DataplaneError, KernelFeatures, PAGE_MTU, attach, links};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// An interface that the program does not run on yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingInterface {
    /// Name.
    pub name: String,
    /// Reason, with advice.
    pub reason: String,
}

/// All configured interfaces.
pub struct Interfaces {
    /// Program under the links.
    program: &'static str,
    pin_path: PathBuf,
    wanted: Vec<String>,
    allow_generic: bool,
    /// Whether programs are loaded with the frags flag, which generic mode does not support.
    frags: bool,
    state: Mutex<AttachState>,
    /// Held while programs are replaced or attached.
    changes: Mutex<()>,
}

#[derive(Default)]
struct AttachState {
    attached: BTreeMap<String, AttachedInterface>,
    waiting: BTreeMap<String, String>,
}

impl Interfaces {
    /// State after a start.
    pub(super) fn new(
        program: &'static str,
        options: &AttachOptions,
        frags: bool,
        attached: Vec<AttachedInterface>,
        waiting: Vec<(String, DataplaneError)>,
    ) -> Self {
        let how = (options.pin_path.clone(), options.interfaces.clone(), options.allow_generic);
        Self::with(program, how, frags, attached, waiting)
    }

    /// State after a start, from pin path, names of interfaces and whether generic mode is allowed.
    pub(super) fn with(
        program: &'static str,
        (pin_path, wanted, allow_generic): (PathBuf, Vec<String>, bool),
        frags: bool,
        attached: Vec<AttachedInterface>,
        waiting: Vec<(String, DataplaneError)>,
    ) -> Self {
        let state = AttachState {
            attached: attached.into_iter().map(|i| (i.name.clone(), i)).collect(),
            waiting: waiting.into_iter().map(|(name, error)| (name, error.to_string())).collect(),
        };
        let (state, changes) = (Mutex::new(state), Mutex::default());
        Self { program, pin_path, wanted, allow_generic, frags, state, changes }
    }

    fn state(&self) -> MutexGuard<'_, AttachState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks out [`Self::try_again`] until the guard is dropped.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Interfaces that the program runs on, in the order of the settings.
    pub fn attached(&self) -> Vec<AttachedInterface> {
        let state = self.state();
        self.wanted.iter().filter_map(|name| state.attached.get(name).cloned()).collect()
    }

    /// Interfaces that the program does not run on yet.
    pub fn waiting(&self) -> Vec<PendingInterface> {
        let state = self.state();
        let all = self.wanted.iter().filter_map(|name| {
            Some(PendingInterface { name: name.clone(), reason: state.waiting.get(name)?.clone() })
        });
        all.collect()
    }

    /// Tries to attach to waiting interfaces, and to those that were removed and are back. Returns the newly attached
    /// interfaces. Blocks.
    pub fn try_again(&self) -> Vec<AttachedInterface> {
        let _held = self.hold();
        let mut new = Vec::new();
        for name in &self.wanted {
            let known = self.state().attached.get(name).map(|i| i.ifindex);
            let result = match links::index_of(name) {
                Ok(ifindex) if known == Some(ifindex) => continue,
                Ok(ifindex) => self.attach(name, ifindex),
                Err(error) => Err(error),
            };
            let mut state = self.state();
            match result {
                Ok(Some(interface)) => {
                    state.waiting.remove(name);
                    state.attached.insert(name.clone(), interface.clone());
                    new.push(interface);
                }
                // Another ABI version's program still forwards.
                Ok(None) => {}
                Err(error) => {
                    state.attached.remove(name);
                    let reason = self.with_advice(name, &error);
                    if state.waiting.insert(name.clone(), reason.clone()).as_ref() != Some(&reason) {
                        tracing::warn!(
                            interface = name,
                            "cannot attach to the interface, retrying each second: {reason}"
                        );
                    }
                }
            }
        }
        new
    }

    /// Error text, with the advice to restart lbd where that helps.
    fn with_advice(&self, name: &str, error: &DataplaneError) -> String {
        let needs_frags =
            !self.frags && KernelFeatures::get().frags && links::largest_mtu([name].into_iter()) > PAGE_MTU;
        match error {
            DataplaneError::NotTaken { .. } if needs_frags => {
                format!(
                    "{error}; or restart lbd, which then loads its programs with frags (without losing packets)"
                )
            }
            _ => error.to_string(),
        }
    }

    fn attach(&self, name: &str, ifindex: u32) -> Result<Option<AttachedInterface>, DataplaneError> {
        let Some(program) = attach::running(&self.pin_path, self.program)? else { return Ok(None) };
        if let Some(link) = links::find(&self.pin_path, name, ifindex)? {
            link.update(&program)?;
            return Ok(Some(link.interface));
        }
        let allow_generic = self.allow_generic && !self.frags;
        links::attach(&self.pin_path, &program, name, ifindex, allow_generic).map(Some)
    }
}
