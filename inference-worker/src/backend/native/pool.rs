//! A small thread pool for data-parallel loops of a few microseconds.
//!
//! Input: a closure and a number of items. Output: when [`Pool::run`] returns, each item has been done once.
//! Called by the native backend some 150 times per decode step, so waking must cost well under a
//! microsecond: workers spin for a bounded time after a job and only then sleep. Each thread begins with a
//! stretch of its own, the same one in every job of as many items, so that what it wrote in one job is still
//! in its cache in the next; then it takes what is left of the others'. A worker that the system has put
//! aside is not waited for: whoever is awake takes its items, and a latecomer finds the gate shut.

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

/// How long an idle worker spins before it sleeps: about the gap between two decode steps.
const SPIN: Duration = Duration::from_micros(100);

/// The gate: bit 0 open, bits 1..16 workers inside, the rest the job's number.
const OPEN: u64 = 1;
const ONE_INSIDE: u64 = 2;
const INSIDE_MASK: u64 = 0xFFFE;
const ONE_JOB: u64 = 1 << 16;

type Job = *const (dyn Fn(usize) + Sync);

/// The next item of a thread's stretch, in a cache line (and its neighbour) of its own.
#[derive(Default)]
#[repr(align(128))]
struct Cursor(AtomicUsize);

struct Shared {
    gate: AtomicU64,
    /// One for each thread, the caller's first.
    next: Vec<Cursor>,
    items: AtomicUsize,
    /// Valid while the gate is open or somebody is inside.
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    sleeping: Vec<AtomicBool>,
}

// SAFETY: `job` is written only by the one thread in `run` (it holds `&mut Pool`) while the gate is shut and
// nobody is inside; workers read it only after they entered an open gate (Acquire).
unsafe impl Sync for Shared {}
// SAFETY: as above; the raw pointer is only dereferenced under that protocol.
unsafe impl Send for Shared {}

/// The pool. `run` uses the calling thread as one of its threads.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<Thread>,
    handles: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let extra = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            gate: AtomicU64::new(0),
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

    /// Number of threads that work on a job.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `job(i)` for every i in `0..items`, each exactly once, on all threads.
    ///
    /// # Panics
    /// When `job` panicked on a worker.
    pub fn run(&mut self, items: usize, job: &(dyn Fn(usize) + Sync)) {
        if items <= 1 || self.threads.is_empty() {
            (0..items).for_each(job);
            return;
        }
        let s = &*self.shared;
        // SAFETY: only the lifetime is erased. Everybody who uses the pointer is inside the gate, and this
        // function does not return (nor unwind: see `Shut`) before the gate is shut and empty.
        let erased: Job = unsafe { std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), Job>(job) };
        // SAFETY: the gate is shut and empty between runs, so no worker reads the cell now.
        unsafe { *s.job.get() = Some(erased) };
        for (thread, cursor) in s.next.iter().enumerate() {
            cursor.0.store(stretch(items, thread, s.next.len()).start, Relaxed);
        }
        s.items.store(items, Relaxed);
        let number = s.gate.load(Relaxed) & !(OPEN | INSIDE_MASK);
        s.gate.store((number + ONE_JOB) | OPEN, SeqCst);
        for (asleep, thread) in s.sleeping.iter().zip(&self.threads) {
            if asleep.load(SeqCst) {
                thread.unpark();
            }
        }
        let shut = Shut(s);
        take_items(s, 0, job);
        drop(shut);
        assert!(!s.panicked.swap(false, Relaxed), "a compute thread panicked");
    }
}

/// Shuts the gate and waits until nobody is inside, also when the caller's own items panic.
struct Shut<'a>(&'a Shared);

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        self.0.gate.fetch_and(!OPEN, AcqRel);
        let mut spins = 0u32;
        while self.0.gate.load(Acquire) & INSIDE_MASK != 0 {
            spins += 1;
            if spins > 2_000 {
                thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
    }
}

/// Which items a thread begins with.
fn stretch(items: usize, thread: usize, threads: usize) -> Range<usize> {
    items * thread / threads..items * (thread + 1) / threads
}

/// Does the items of thread `me`'s stretch, then what others have left.
fn take_items(s: &Shared, me: usize, job: &(dyn Fn(usize) + Sync)) {
    let (items, threads) = (s.items.load(Relaxed), s.next.len());
    for thread in (me..threads).chain(0..me) {
        let (end, next) = (stretch(items, thread, threads).end, &s.next[thread].0);
        // A look first: other threads' cursors are left in their caches when nothing is to be had.
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
        let gate = s.gate.load(Acquire);
        if gate & OPEN != 0 && gate / ONE_JOB != done {
            if s.gate.compare_exchange(gate, gate + ONE_INSIDE, AcqRel, Relaxed).is_err() {
                continue;
            }
            done = gate / ONE_JOB;
            // SAFETY: this thread is inside the gate, so `run` keeps the closure alive.
            let job = unsafe { (*s.job.get()).map(|j| &*j) };
            if let Some(job) = job
                && std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| take_items(s, me + 1, job)))
                    .is_err()
            {
                s.panicked.store(true, Relaxed);
            }
            s.gate.fetch_sub(ONE_INSIDE, AcqRel);
            idle_since = Instant::now();
            spins = 0;
            continue;
        }
        std::hint::spin_loop();
        spins += 1;
        if spins.is_multiple_of(64) && idle_since.elapsed() > SPIN {
            s.sleeping[me].store(true, SeqCst);
            let gate = s.gate.load(SeqCst);
            let job_waits = gate & OPEN != 0 && gate / ONE_JOB != done;
            if !job_waits && !s.stop.load(SeqCst) {
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
    fn every_item_is_done_once_also_after_a_sleep() {
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
    fn a_panic_on_a_worker_reaches_the_caller_and_the_pool_lives_on() {
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
