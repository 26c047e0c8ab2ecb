//! Interfaces that the program runs on, and those that wait for it: missing when lbd started, removed since, or
//! with a driver that refused the program. They are retried while lbd runs; links that somebody detached are made again,
//! and so are pins.

use super::{
    AttachOptions, AttachedInterface, DataplaneError, KernelFeatures, PAGE_MTU, attach, kept::KeptPins, links,
};
use std::{
    collections::{BTreeMap, BTreeSet},
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
    kept: Mutex<KeptPins>,
}

#[derive(Default)]
struct AttachState {
    attached: BTreeMap<String, AttachedInterface>,
    waiting: BTreeMap<String, String>,
    /// Why pins are missing.
    unpinned: Option<String>,
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
            unpinned: None,
        };
        let (state, changes) = (Mutex::new(state), Mutex::default());
        let kept = Mutex::new(KeptPins::new(&pin_path));
        let this = Self { program, pin_path, wanted, allow_generic, frags, state, changes, kept };
        this.keep_pins();
        this
    }

    fn state(&self) -> MutexGuard<'_, AttachState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks out [`Self::repair`] until the guard is dropped.
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

    /// Why pins are missing that cannot be restored.
    pub fn unpinned(&self) -> Option<String> {
        self.state().unpinned.clone()
    }

    /// Pins again what somebody unpinned, and takes hold of what is pinned now.
    fn keep_pins(&self) {
        let attached: BTreeSet<u32> = self.state().attached.values().map(|i| i.ifindex).collect();
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let result = kept.restore();
        let result = result.and_then(|restored| kept.refresh(&attached).map(|()| restored));
        let path = self.pin_path.display();
        let problem = match result {
            Ok(0) => None,
            Ok(restored) => {
                tracing::warn!(
                    restored,
                    "pins under {path} were removed and are restored; forwarding went on"
                );
                None
            }
            Err(error) => Some(format!(
                "pins under {path} are missing, so forwarding would end with lbd, and they cannot be restored: {error}"
            )),
        };
        let mut state = self.state();
        if let Some(problem) = problem.as_ref().filter(|_| state.unpinned != problem) {
            tracing::error!("{problem}");
        }
        state.unpinned = problem;
    }

    /// Restores pins and links that somebody removed, and tries to attach to interfaces that wait or are back. Returns
    /// the newly attached interfaces. Blocks.
    pub fn repair(&self) -> Vec<AttachedInterface> {
        let _held = self.hold();
        self.keep_pins();
        let new = self.attach_missing();
        if !new.is_empty() {
            self.keep_pins();
        }
        new
    }

    fn attach_missing(&self) -> Vec<AttachedInterface> {
        let mut new = Vec::new();
        for name in &self.wanted {
            let known = self.state().attached.get(name).map(|i| i.ifindex);
            let result = match links::index_of(name) {
                Ok(ifindex) if known == Some(ifindex) && self.has_link(name, ifindex) => continue,
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

    /// Whether the link that lbd made is still attached. If that cannot be determined, it is.
    fn has_link(&self, name: &str, ifindex: u32) -> bool {
        let has_link = links::find(&self.pin_path, name, ifindex).map_or(true, |link| link.is_some());
        if !has_link {
            tracing::warn!(
                interface = name,
                "somebody detached the program from the interface; attaching it again"
            );
        }
        has_link
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
