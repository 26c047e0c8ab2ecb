//! `[[hook]]`: programs that lbd starts when something happens.

use crate::desired::model::unknown_kind;
use serde::Deserialize;
use std::path::Path;

/// Longest time that a program may take, in seconds.
const MAX_TIMEOUT_S: u32 = 3_600;

/// A program that is started for events. Only the daemon's own file has hooks: the API has no way to set them.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hook {
    /// Kinds of events, or beginnings of them.
    pub on: Vec<String>,
    /// Path of the program, and its arguments.
    pub run: Vec<String>,
    /// Seconds after which the program and its process group are killed.
    #[serde(default = "default_timeout_s")]
    pub timeout_s: u32,
}

fn default_timeout_s() -> u32 {
    10
}

impl Hook {
    /// What is wrong with the hook, and the key that it is about; none if nothing is.
    pub fn check(&self) -> Option<(&'static str, String)> {
        if self.on.is_empty() {
            return Some(("on", "on names no event: list kinds such as \"backend.down\"".to_owned()));
        }
        if let Some(what) = self.on.iter().find_map(|kind| unknown_kind(kind)) {
            return Some(("on", format!("on: {what} (docs/reference/api.md lists the kinds)")));
        }
        match self.run.first() {
            None => Some(("run", "run names no program: list its path, then its arguments".to_owned())),
            Some(program) if !Path::new(program).is_absolute() => {
                Some(("run", format!("run: {program:?} is not an absolute path")))
            }
            Some(_) if !(1..=MAX_TIMEOUT_S).contains(&self.timeout_s) => {
                let what = format!("timeout_s = {} is out of range: 1 to {MAX_TIMEOUT_S}", self.timeout_s);
                Some(("timeout_s", what))
            }
            Some(_) => None,
        }
    }
}
