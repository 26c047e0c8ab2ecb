//! Work that blocks, such as reads and writes of files and maps, off the threads that run async code.

use std::cell::Cell;
use tokio::task::JoinError;

thread_local! {
    static IS_INLINE: Cell<bool> = const { Cell::new(false) };
}

/// From now on, blocking work that this thread asks for runs on this thread, at once. For simulations, in which
/// everything must happen in one order.
pub fn run_on_this_thread() {
    IS_INLINE.set(true);
}

/// Runs blocking work off the async threads. Work that has begun is finished even if the caller stops waiting.
///
/// # Errors
/// The work panicked, or the runtime is shutting down.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if IS_INLINE.get() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn work_runs_on_another_thread_unless_this_one_is_told_to() {
        let run = || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(blocking(|| thread::current().id())).unwrap()
        };
        assert_ne!(run(), thread::current().id());
        let inline = thread::spawn(move || {
            run_on_this_thread();
            run() == thread::current().id()
        });
        assert!(inline.join().unwrap());
        assert_ne!(run(), thread::current().id(), "other threads are not concerned");
    }
}
