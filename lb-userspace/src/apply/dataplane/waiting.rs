//! The configured interfaces: those that the program runs on, and those that it waits for. While lbd runs, each is
//! compared with what the kernel shows ([`Interfaces::repair`]): removed pins, detached and replaced programs are put back,
//! and interfaces that are missing, or whose driver refuses the program, are retried.

use super::{
    AttachOptions, AttachedInterface, DataplaneError, KernelFeatures, PAGE_MTU, attach,
    expected::{Absence, Action, Facts, LinkTrouble, decide},
    kept::KeptPins,
    links,
    seen::Questions,
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

/// What [`Interfaces::repair`] did.
#[derive(Debug, Default)]
pub struct Repaired {
    /// Interfaces that the program was attached to just now.
    pub new: Vec<AttachedInterface>,
    /// Whether the program runs on other interfaces than before, or anew on one.
    pub has_changed: bool,
}

#[derive(Default)]
struct AttachState {
    attached: BTreeMap<String, AttachedInterface>,
    waiting: BTreeMap<String, String>,
    /// Index of the interface that the program was last on, by name.
    last: BTreeMap<String, u32>,
    /// What is wrong with attached interfaces, by name.
    troubles: BTreeMap<String, LinkTrouble>,
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
        let mut last: BTreeMap<String, u32> = wanted
            .iter()
            .filter_map(|name| Some((name.clone(), links::pinned_to(&pin_path, name)?)))
            .collect();
        last.extend(attached.iter().map(|i| (i.name.clone(), i.ifindex)));
        let state = AttachState {
            attached: attached.into_iter().map(|i| (i.name.clone(), i)).collect(),
            waiting: waiting.into_iter().map(|(name, error)| (name, error.to_string())).collect(),
            last,
            ..AttachState::default()
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

    /// What is wrong with interfaces that the program runs on, as sentences by name.
    pub fn troubles(&self) -> BTreeMap<String, String> {
        let state = self.state();
        state.troubles.iter().map(|(name, trouble)| (name.clone(), trouble.sentence(name))).collect()
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

    /// Compares the interfaces with what the kernel shows, and repairs pins, links and programs. Blocks.
    pub fn repair(&self) -> Repaired {
        let _held = self.hold();
        self.keep_pins();
        let before: Vec<u32> = self.attached().iter().map(|i| i.ifindex).collect();
        let new: Vec<AttachedInterface> = match Questions::open() {
            Ok(questions) => {
                self.wanted.iter().filter_map(|name| self.repair_one(name, &questions)).collect()
            }
            Err(error) => {
                tracing::warn!(%error, "cannot look at the interfaces");
                Vec::new()
            }
        };
        if !new.is_empty() {
            self.keep_pins();
        }
        let has_changed =
            !new.is_empty() || before != self.attached().iter().map(|i| i.ifindex).collect::<Vec<_>>();
        Repaired { new, has_changed }
    }

    /// Gathers the facts about an interface. Under the lock of changes, so that no program is replaced meanwhile.
    fn facts(&self, name: &str, questions: &Questions) -> Result<Facts, DataplaneError> {
        let attached_to = self.state().last.get(name).copied();
        let ask = |source| DataplaneError::Attach { interface: name.to_owned(), source };
        let named = questions.by_name(name).map_err(ask)?;
        let indexed =
            attached_to.map(|ifindex| questions.by_index(ifindex)).transpose().map_err(ask)?.flatten();
        Ok(Facts {
            attached_to,
            named,
            indexed,
            links: links::ours(&self.pin_path)?,
            ours: attach::pinned_programs(&self.pin_path)?,
        })
    }

    /// Compares and repairs one interface; returns it if the program was attached to it just now.
    fn repair_one(&self, name: &str, questions: &Questions) -> Option<AttachedInterface> {
        let facts = match self.facts(name, questions) {
            Ok(facts) => facts,
            Err(error) => {
                // Unknown is not gone: the interface stays what it was.
                tracing::debug!(interface = name, %error, "cannot look at the interface");
                return None;
            }
        };
        let (action, trouble) = decide(&facts);
        self.note_trouble(name, trouble, matches!(action, Action::Wait(_)));
        match action {
            Action::Nothing => self.note_running(name, &facts),
            Action::Wait(absence) => self.note_waiting(name, absence_reason(name, absence)),
            Action::Attach(ifindex) | Action::Update(ifindex) => {
                if matches!(action, Action::Update(_)) {
                    tracing::warn!(
                        interface = name,
                        "somebody replaced the program under lbd's link; putting it back"
                    );
                } else if facts.attached_to == Some(ifindex) && self.is_attached(name) {
                    tracing::warn!(
                        interface = name,
                        "somebody detached the program from the interface; attaching it again"
                    );
                }
                match self.attach(name, action) {
                    Ok(Some(interface)) => return Some(self.note_attached(interface)),
                    // Another ABI version's program still forwards.
                    Ok(None) => {}
                    Err(error) => self.note_waiting(name, self.with_advice(name, &error)),
                }
            }
        }
        None
    }

    fn is_attached(&self, name: &str) -> bool {
        self.state().attached.contains_key(name)
    }

    /// Notes that the program runs on an interface, perhaps after a restart of lbd under another name of the interface.
    fn note_running(&self, name: &str, facts: &Facts) {
        let Some(ifindex) = facts.named.as_ref().or(facts.indexed.as_ref()).map(|seen| seen.ifindex) else {
            return;
        };
        if self.state().attached.get(name).is_some_and(|i| i.ifindex == ifindex) {
            return;
        }
        if let Some(mode) = links::mode_of(&self.pin_path, ifindex) {
            self.note_attached(AttachedInterface { name: name.to_owned(), ifindex, mode, why_generic: None });
        }
    }

    fn note_attached(&self, interface: AttachedInterface) -> AttachedInterface {
        let mut state = self.state();
        let name = interface.name.clone();
        state.waiting.remove(&name);
        state.last.insert(name.clone(), interface.ifindex);
        state.attached.insert(name, interface.clone());
        interface
    }

    fn note_waiting(&self, name: &str, reason: String) {
        let mut state = self.state();
        state.attached.remove(name);
        if state.waiting.insert(name.to_owned(), reason.clone()).as_ref() != Some(&reason) {
            tracing::warn!(interface = name, "not attached, retrying every second: {reason}");
        }
    }

    fn note_trouble(&self, name: &str, trouble: Option<LinkTrouble>, is_absent: bool) {
        let mut state = self.state();
        match &trouble {
            Some(new) if state.troubles.get(name) != Some(new) => tracing::warn!("{}", new.sentence(name)),
            None if !is_absent && state.troubles.contains_key(name) => {
                tracing::info!(interface = name, "interface is as expected again");
            }
            _ => {}
        }
        match trouble {
            Some(trouble) => state.troubles.insert(name.to_owned(), trouble),
            None => state.troubles.remove(name),
        };
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

    fn attach(&self, name: &str, action: Action) -> Result<Option<AttachedInterface>, DataplaneError> {
        let Some(program) = attach::running(&self.pin_path, self.program)? else { return Ok(None) };
        let ifindex = match action {
            Action::Update(ifindex) => match links::find(&self.pin_path, name, ifindex)? {
                Some(link) => {
                    link.update(&program)?;
                    return Ok(Some(link.interface));
                }
                None => ifindex,
            },
            Action::Attach(ifindex) => ifindex,
            Action::Nothing | Action::Wait(_) => return Ok(None),
        };
        let allow_generic = self.allow_generic && !self.frags;
        links::attach(&self.pin_path, &program, name, ifindex, allow_generic).map(Some)
    }
}

/// Why the program is not on an interface that does not exist here.
fn absence_reason(name: &str, absence: Absence) -> String {
    match absence {
        Absence::NeverSeen => match links::index_of(name) {
            Err(error) => error.to_string(),
            Ok(_) => "it has just appeared".to_owned(),
        },
        Absence::Gone => "it was deleted; lbd attaches to it when it is back".to_owned(),
        Absence::Moved => {
            "it has moved to another network namespace; lbd attaches to it when it is back".to_owned()
        }
    }
}
