//! Time and chance of a simulating thread.
//!
//! Within a runtime the time is that of the runtime's paused clock; all clocks count from [`ORIGIN`]. The wall clock
//! differs from it by an offset, which each host has for itself.

use std::{cell::Cell, time::Duration};
use tokio::{runtime::Handle, time::Instant};

/// Simulated time since boot at which a simulation begins.
pub const ORIGIN: Duration = Duration::from_secs(100_000);
/// Wall time at [`ORIGIN`] of a host whose clock is right.
const WALL_ORIGIN: Duration = Duration::from_secs(1_790_000_000);

/// What a simulating thread keeps.
#[derive(Clone, Copy)]
struct Simulated {
    /// Time outside of runtimes.
    now: Duration,
    /// Offset of the wall clock, in milliseconds.
    wall_ms: i64,
    /// [`ORIGIN`] on the clock of the standard library; none until it is known.
    origin: Option<std::time::Instant>,
    random: Random,
}

thread_local! {
    static SIMULATED: Cell<Option<Simulated>> = const { Cell::new(None) };
}

/// Makes the calling thread a simulating one.
pub fn begin(seed: u64) {
    let mut simulated = Simulated { now: ORIGIN, wall_ms: 0, origin: None, random: Random(seed) };
    SIMULATED.set(Some(simulated));
    simulated.origin = Some(std::time::Instant::now());
    SIMULATED.set(Some(simulated));
}

/// Whether the calling thread simulates.
pub fn is_simulated() -> bool {
    SIMULATED.try_with(|s| s.get().is_some()).unwrap_or(false)
}

fn get() -> Option<Simulated> {
    SIMULATED.try_with(Cell::get).ok().flatten()
}

fn change(change: impl FnOnce(&mut Simulated)) {
    if let Some(mut simulated) = get() {
        change(&mut simulated);
        SIMULATED.set(Some(simulated));
    }
}

/// Simulated time since boot; none on other threads.
pub fn boot_time() -> Option<Duration> {
    let simulated = get()?;
    match simulated.origin {
        // The clock of a runtime is paused, so that this does not come back here.
        Some(origin) if Handle::try_current().is_ok() => {
            Some(ORIGIN + Instant::now().into_std().saturating_duration_since(origin))
        }
        _ => Some(simulated.now),
    }
}

/// Simulated wall time; none on other threads.
pub fn wall_time() -> Option<Duration> {
    let since = boot_time()?.saturating_sub(ORIGIN);
    let offset = get()?.wall_ms;
    let step = Duration::from_millis(offset.unsigned_abs());
    let right = WALL_ORIGIN + since;
    Some(if offset < 0 { right.saturating_sub(step) } else { right + step })
}

/// Time since boot, on a simulating thread.
pub fn now() -> Duration {
    boot_time().expect("the thread simulates")
}

/// Sets the time outside of runtimes.
pub fn set_now(now: Duration) {
    change(|s| s.now = now);
}

/// Sets how far the wall clock is ahead, in milliseconds.
pub fn set_wall_offset(ms: i64) {
    change(|s| s.wall_ms = ms);
}

/// A time since boot on the clock of runtimes.
pub fn instant(at: Duration) -> Instant {
    let origin = get().and_then(|s| s.origin).expect("the thread simulates");
    Instant::from_std(origin + at.saturating_sub(ORIGIN))
}

/// Fills bytes from the seed.
pub fn fill_random(bytes: &mut [u8]) {
    change(|s| {
        for chunk in bytes.chunks_mut(8) {
            let word = s.random.draw().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    });
}

/// A sequence of choices that depends on its seed only (splitmix64).
#[derive(Clone, Copy, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit.max(1)
    }

    /// True in `percent` of all cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of several.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// One of several by weight.
    pub fn weighted<T: Copy>(&mut self, all: &[(T, u64)]) -> T {
        let mut left = self.below(all.iter().map(|(_, weight)| weight).sum());
        for &(one, weight) in all {
            if left < weight {
                return one;
            }
            left -= weight;
        }
        all[0].0
    }
}
