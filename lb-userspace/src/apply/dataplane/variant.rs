//! Decides whether programs are loaded with the frags flag, for packets whose data is in several pieces.
//!
//! The decision is the same for all interfaces of a daemon, because they share program arrays, and the kernel wants all
//! programs of an array alike. With the flag where an interface's MTU needs it, and without it otherwise: the flag costs
//! performance in drivers, kernels before 5.18 do not support it, and in generic mode kernels from 6.3 on may panic with
//! it. A program that runs with the flag keeps it until `lbd detach`, in driver mode.

use super::{DataplaneError, kernel, pins, sys};
use lb_common::names::stage::{AFTER, BEFORE, TRIAL};
use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    path::{Path, PathBuf},
};

/// Largest MTU that every driver accepts without frags: packet, headroom and the kernel's own data share a page (igb
/// and ixgbe have the least room). A program with the flag attaches to drivers without frags too, so this bound
/// may be lower than a driver's own.
pub const PAGE_MTU: u32 = 3_046;

/// Facts that the decision depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Situation {
    /// Whether the kernel supports the flag.
    pub kernel_has: bool,
    /// Largest MTU of the interfaces.
    pub mtu: u32,
    /// Whether a program of ours runs in generic mode, or will.
    pub is_generic: bool,
    /// Whether users' programs in the shared array have the flag; none without such programs.
    pub users: Option<bool>,
    /// Whether the program under our links has the flag, of any ABI version; none without such a program.
    pub running: Option<bool>,
}

impl Situation {
    /// Whether to load programs with the flag.
    pub fn choose(self) -> bool {
        if let Some(users) = self.users {
            // A firewall among the users' programs must not be bypassed because an MTU has changed.
            return users && self.kernel_has;
        }
        if !self.kernel_has || self.is_generic {
            return false;
        }
        // A running program with the flag keeps it: a driver may deliver packets in several pieces by now (veth does with any
        // MTU), and another ABI version's program is put into our array while its flows are taken over.
        self.running.unwrap_or(false) || self.mtu > PAGE_MTU
    }
}

/// Whether users' programs in an array have the flag; none if there is no array or no user's program in it.
pub fn of_users(array: &Path) -> io::Result<Option<bool>> {
    if !array.exists() {
        return Ok(None);
    }
    let array = sys::open(array)?;
    let holds = |place: u32| sys::lookup(&array, &place.to_ne_bytes(), &mut [0; 4]);
    if !holds(BEFORE)? && !holds(AFTER)? {
        return Ok(None);
    }
    kernel::fits(&array, &kernel::trial_program(false)?).map(|is_plain| Some(!is_plain))
}

/// Whether a loaded program has the flag.
pub fn of_program(program: &impl AsFd) -> io::Result<bool> {
    let Ok(like) = kernel::trial_program(true) else { return Ok(false) };
    let array = sys::program_array(TRIAL + 1)?;
    // An array is fixed to the kind of its first program.
    sys::update(&array, &0u32.to_ne_bytes(), &like.as_raw_fd().to_ne_bytes(), 0)?;
    kernel::fits(&array, program)
}

/// A pinned program array: its path during a start, and after it. They differ where the present array holds programs of
/// the other kind, and keeps working for the program that still runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArrayPin {
    /// Path at which it is pinned now.
    pub used: PathBuf,
    path: PathBuf,
}

impl ArrayPin {
    /// The array at `path` if programs with or without the flag fit into it, otherwise one beside it.
    pub fn of(path: PathBuf, frags: bool) -> Result<Self, DataplaneError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source: io::Error| match source.kind() {
                io::ErrorKind::PermissionDenied => DataplaneError::Denied { what: "try a program array" },
                _ => DataplaneError::Pin { what: "cannot try program array", path, source },
            }
        };
        let like = kernel::trial_program(frags).map_err(failed(&path))?;
        let fits = |at: &Path| -> io::Result<bool> { kernel::fits(&sys::open(at)?, &like) };
        if !path.exists() || fits(&path).map_err(failed(&path))? {
            return Ok(Self { used: path.clone(), path });
        }
        // An array left by a start that was killed is reused if it fits: a program may run with it.
        let next = pins::next(&path);
        if next.exists() && !fits(&next).map_err(failed(&next))? {
            pins::remove(&next)?;
        }
        Ok(Self { used: next, path })
    }

    /// Moves the array to its final path, replacing one that is no longer used.
    pub fn settle(&mut self) -> Result<(), DataplaneError> {
        if self.used != self.path {
            std::fs::rename(&self.used, &self.path).map_err(|source| DataplaneError::Pin {
                what: "cannot rename",
                path: self.used.clone(),
                source,
            })?;
            self.used.clone_from(&self.path);
        }
        Ok(())
    }

    /// Removes the array of a failed start.
    pub fn undo(&self) {
        if self.used != self.path {
            // If this fails, the next start removes or reuses the array.
            let _ = std::fs::remove_file(&self.used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Situation =
        Situation { kernel_has: true, mtu: 1_500, is_generic: false, users: None, running: None };

    #[test]
    fn frags_are_for_packets_larger_than_a_page_takes() {
        assert!(!NEW.choose());
        assert!(!Situation { mtu: PAGE_MTU, ..NEW }.choose());
        assert!(Situation { mtu: PAGE_MTU + 1, ..NEW }.choose());
        assert!(Situation { mtu: 9_000, ..NEW }.choose());
    }

    #[test]
    fn never_where_the_kernel_does_not_know_them_or_in_generic_mode() {
        let large = Situation { mtu: 9_000, ..NEW };
        for wanted in [None, Some(true), Some(false)] {
            let old = Situation { kernel_has: false, running: wanted, users: wanted, ..large };
            assert!(!old.choose(), "{old:?}");
            let generic = Situation { is_generic: true, running: wanted, ..large };
            assert!(!generic.choose(), "{generic:?}");
        }
    }

    #[test]
    fn users_programs_decide_for_the_array_that_they_share() {
        assert!(Situation { users: Some(true), ..NEW }.choose());
        assert!(!Situation { users: Some(false), mtu: 9_000, ..NEW }.choose());
    }

    #[test]
    fn a_program_with_frags_is_followed_by_one_with_frags() {
        assert!(Situation { running: Some(true), ..NEW }.choose());
        assert!(!Situation { running: Some(false), ..NEW }.choose());
        assert!(Situation { running: Some(false), mtu: 9_000, ..NEW }.choose());
    }
}
