//! A small thread pool for data-parallel loops of a few microseconds.
//!
//! Input: a closure and a number of items. When [`Pool::run`] returns, the closure has been called once per item. The
//! native backend calls it about 150 times per decode step, so starting a job must take much less than a microsecond:
//! after a job, workers spin for a limited time before they sleep. Each thread has its own range of items, which is
//! the same in all jobs of equal size, so that the data it wrote in one job is still in its cache in the next. A
//! thread that has finished its range takes items from the other ranges. `run` does not wait for a worker that the
//! kernel has not scheduled: the other threads take its items, and the worker cannot join a job that is closed.

use std::{
    cell::UnsafeCell,
    ops::Range,
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64, AtomicUsize,
            Ordering::{AcqRel, Acquire, Relaxed, SeqCst},
        },
    },
    thread::{self, JoinHandle, Thread},
    time::{Duration, Instant},
};

/// How long an idle worker spins before it sleeps: about the time between two decode steps.
const SPIN: Duration = Duration::from_micros(100);

/// Bits of the state word: bit 0 is set while the job is open, bits 1..16 count the active workers, and the rest is
/// the number of the job.
const OPEN: u64 = 1;
const ONE_ACTIVE: u64 = 2;
const ACTIVE_MASK: u64 = 0xFFFE;
const ONE_JOB: u64 = 1 << 16;

type Job = *const (dyn Fn(usize) + Sync);

/// The next item of a thread's range. Aligned to two cache lines, because processors prefetch pairs of lines.
#[derive(Default)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

struct Shared {
    state: AtomicU64,
    /// One per thread; the first one is that of the caller.
    next: Vec<Cursor>,
    items: AtomicUsize,
    /// Valid while the job is open or a worker is active.
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

// SAFETY: `job` is written only by the one thread in `run` (which has `&mut Pool`) while the job is closed and no
// worker is active; workers read it only after they have joined an open job (Acquire).
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is dereferenced only under that protocol.
unsafe impl Send for Shared {}

/// A thread pool. `run` uses the calling thread as one of its threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Creates a pool of `threads` threads, including the caller's.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let extra = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: (0..=extra).map(|_| Cursor::default()).collect(),
            items: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            sleeping: (0..extra).map(|_| AtomicBool::new(false)).collect(),
        });
        let handles = (0..extra)
            .map(|i| {
                let shared = shared.clone();
                thread::Builder::new().name(format!("compute-{}", i + 1)).spawn(move || worker(&shared, i))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let threads = handles.iter().map(|h| h.thread().clone()).collect();
        Ok(Self { shared, threads, handles })
    }

    /// Returns the number of threads, including the caller's.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `job(i)` exactly once for every i in `0..items`, on all threads.
    ///
    /// # Panics
    /// If `job` panicked on a worker.
    pub fn run(&mut self, items: usize, job: &(dyn Fn(usize) + Sync)) {
        if items <= 1 || self.threads.is_empty() {
            (0..items).for_each(job);
            return;
        }
        let s = &*self.shared;
        // SAFETY: only the lifetime is erased. Only active workers use the pointer, and this function neither returns
        // nor unwinds (see `CloseOnDrop`) before the job is closed and no worker is active.
        let erased: Job = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        // SAFETY: between jobs no worker is active, so none reads the cell now.
        unsafe { *s.job.get() = Some(erased) };
        for (thread, cursor) in s.next.iter().enumerate() {
            cursor.0.store(thread_range(items, thread, s.next.len()).start, Relaxed);
        }
        s.items.store(items, Relaxed);
        let number = s.state.load(Relaxed) & !(OPEN | ACTIVE_MASK);
        s.state.store((number + ONE_JOB) | OPEN, SeqCst);
        for (asleep, thread) in s.sleeping.iter().zip(&self.threads) {
            if asleep.load(SeqCst) {
                thread.unpark();
            }
        }
        let close = CloseOnDrop(s);
        run_items(s, 0, job);
        drop(close);
        assert!(!s.panicked.swap(false, Relaxed), "a compute thread panicked");
    }
}

/// Closes the job and waits until no worker is active, even if an item of the caller panics.
struct CloseOnDrop<'a>(&'a Shared);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, AcqRel);
        let mut spins = 0u32;
        while self.0.state.load(Acquire) & ACTIVE_MASK != 0 {
            spins += 1;
            if spins > 2_000 {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

/// Returns the range of a thread.
fn thread_range(items: usize, thread: usize, threads: usize) -> Range<usize> {
    items * thread / threads..items * (thread + 1) / threads
}

/// Runs the items of thread `me`'s range, then the remaining items of the other ranges.
fn run_items(s: &Shared, me: usize, job: &(dyn Fn(usize) + Sync)) {
    let (items, threads) = (s.items.load(Relaxed), s.next.len());
    for thread in (me..threads).chain(0..me) {
        let (end, next) = (thread_range(items, thread, threads).end, &s.next[thread].0);
        // Reads before it writes, so that cursors of finished ranges stay shared in all caches.
        while next.load(Relaxed) < end {
            let i = next.fetch_add(1, Relaxed);
            if i >= end {
                break;
            }
            job(i);
        }
    }
}

fn worker(s: &Shared, me: usize) {
    let mut done = 0u64;
    let mut idle_since = Instant::now();
    let mut spins = 0u32;
    while !s.stop.load(Relaxed) {
        let state = s.state.load(Acquire);
        if state & OPEN != 0 && state / ONE_JOB != done {
            if s.state.compare_exchange(state, state + ONE_ACTIVE, AcqRel, Relaxed).is_err() {
                continue;
            }
            done = state / ONE_JOB;
            // SAFETY: this worker is active, so `run` keeps the closure alive.
            let job = unsafe { (*s.job.get()).map(|j| &*j) };
            if let Some(job) = job
                && std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_items(s, me + 1, job)))
                    .is_err()
            {
                s.panicked.store(true, Relaxed);
            }
            s.state.fetch_sub(ONE_ACTIVE, AcqRel);
            idle_since = Instant::now();
            spins = 0;
            continue;
        }
        std::hint::spin_loop();
        spins += 1;
        if spins.is_multiple_of(64) && idle_since.elapsed() > SPIN {
            s.sleeping[me].store(true, SeqCst);
            let state = s.state.load(SeqCst);
            let job_is_open = state & OPEN != 0 && state / ONE_JOB != done;
            if !job_is_open && !s.stop.load(SeqCst) {
                thread::park();
            }
            s.sleeping[me].store(false, SeqCst);
            idle_since = Instant::now();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.threads.iter().for_each(Thread::unpark);
        for handle in self.handles.drain(..) {
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_runs_once_even_after_workers_slept() {
        let mut pool = Pool::new(3).unwrap();
        for round in 0..2_000usize {
            let items = round % 17;
            let seen: Vec<AtomicUsize> = (0..items).map(|_| AtomicUsize::new(0)).collect();
            pool.run(items, &|i| {
                seen[i].fetch_add(1, Relaxed);
            });
            assert!(seen.iter().all(|s| s.load(Relaxed) == 1), "round {round}");
            if round % 500 == 0 {
                thread::sleep(SPIN * 5);
            }
        }
    }

    #[test]
    fn a_panic_on_a_worker_reaches_the_caller_and_the_pool_stays_usable() {
        let mut pool = Pool::new(2).unwrap();
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(64, &|i| {
                thread::sleep(Duration::from_micros(50));
                assert!(i != 40, "item 40");
            });
        }));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 45);
    }
}
