//! Waiting for a condition, with a name for it when it does not come.

use std::{
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const STEP: Duration = Duration::from_millis(5);

/// `usual` on an ordinary machine; `LB_TEST_PATIENCE` times as long where programs run slower, as in an emulator.
pub fn patience(usual: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| {
        let set = std::env::var("LB_TEST_PATIENCE").ok();
        set.map_or(1, |text| text.parse().expect("LB_TEST_PATIENCE is a whole number, such as 10"))
    });
    usual * *factor
}

/// Returns what `condition` yields once it yields something; an error that
/// names `what` when `timeout` (see [`patience`]) passes first.
pub fn until_some<T>(what: &str, timeout: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    let timeout = patience(timeout);
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
