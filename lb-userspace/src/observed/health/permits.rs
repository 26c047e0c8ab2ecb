//! Who may probe when the probes in flight are limited.
//!
//! A backend whose connections are answered by silence holds a permit for the whole timeout; one that answers, for a
//! round trip. With one queue for all, a few hundred silent backends delay the checks of every other one. So the
//! permits are shared by how the last probe of a backend went: half of them are for backends that answered, a quarter
//! each at most for those that were silent and those that have not been probed yet.

use tokio::sync::{Semaphore, SemaphorePermit};

/// How the last probe of a backend went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lane {
    /// There was none.
    #[default]
    New,
    /// It was answered, whatever the answer.
    Answering,
    /// It held its permit for the whole timeout.
    Silent,
}

/// Permits of all probes in flight.
pub struct Permits {
    total: usize,
    all: Semaphore,
    new: Semaphore,
    silent: Semaphore,
}

/// A permit; dropped, it is free again.
pub struct Permit<'a> {
    _all: SemaphorePermit<'a>,
    _lane: Option<SemaphorePermit<'a>>,
}

impl Permits {
    /// Permits for so many probes at once.
    pub fn new(total: usize) -> Self {
        let total = total.max(1);
        let quarter = (total / 4).max(1);
        Self {
            total,
            all: Semaphore::new(total),
            new: Semaphore::new(quarter),
            silent: Semaphore::new(quarter),
        }
    }

    /// Number of probes that may be in flight at once.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Waits for a permit, first come first served within a lane. None once the semaphores are closed, which does not
    /// happen.
    pub async fn acquire(&self, lane: Lane) -> Option<Permit<'_>> {
        let lane = match lane {
            Lane::Answering => None,
            Lane::New => Some(self.new.acquire().await.ok()?),
            Lane::Silent => Some(self.silent.acquire().await.ok()?),
        };
        Some(Permit { _all: self.all.acquire().await.ok()?, _lane: lane })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn silent_and_new_backends_leave_half_of_the_permits() {
        let permits = Permits::new(8);
        let take = |lane| permits.acquire(lane).now_or_never().flatten();
        let silent: Vec<_> = std::iter::from_fn(|| take(Lane::Silent)).collect();
        let new: Vec<_> = std::iter::from_fn(|| take(Lane::New)).collect();
        let answering: Vec<_> = std::iter::from_fn(|| take(Lane::Answering)).collect();
        assert_eq!((silent.len(), new.len(), answering.len()), (2, 2, 4));
        drop(silent);
        assert!(take(Lane::Answering).is_some(), "what is free is for all");
        let one = Permits::new(0);
        assert!(one.acquire(Lane::Silent).now_or_never().flatten().is_some(), "at least one probe");
    }
}
