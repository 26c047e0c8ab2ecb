//! Waiting for a condition, with a name for it when it does not come.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(5);

/// Returns what `condition` yields once it yields something; an error that
/// names `what` when `timeout` passes first.
pub fn until_some<T>(what: &str, timeout: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if start.elapsed() > timeout {
            bail!("waited {timeout:?} in vain until {what}");
        }
        thread::sleep(STEP);
    }
}

/// Waits until `condition` holds and says how long that took.
pub fn until(what: &str, timeout: Duration, mut condition: impl FnMut() -> bool) -> Result<Duration> {
    let start = Instant::now();
    until_some(what, timeout, || condition().then(|| start.elapsed()))
}
