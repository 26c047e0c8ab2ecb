//! Runs work that wakes up often but does little each time on a thread with its own runtime. On the shared runtime each
//! wake-up would also wake a second thread, which searches for work to steal and finds none.

use anyhow::Context;
use std::future::Future;
use tokio::{runtime::Builder, sync::oneshot};

/// Runs the future that `make` creates on a thread with this name until the future ends or the caller stops waiting.
///
/// # Errors
/// The thread cannot be started, or panicked.
pub async fn own_thread<F: Future<Output = ()>>(
    name: &'static str,
    make: impl FnOnce() -> F + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (mut waiting, ended) = oneshot::channel();
    let run = move || {
        let is_done = runtime.block_on(async {
            tokio::select! {
                () = make() => true,
                () = waiting.closed() => false,
            }
        });
        // Does not wait for blocking work.
        runtime.shutdown_background();
        if is_done {
            let _ = waiting.send(());
        }
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .with_context(|| format!("cannot start the thread {name}"))?;
    ended.await.with_context(|| format!("the thread {name} panicked: see the log above"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{sync::mpsc, time::Duration};

    #[tokio::test]
    async fn the_thread_ends_with_its_work_or_its_caller() {
        let (tell, told) = mpsc::channel();
        own_thread("short", move || async move {
            tokio::time::sleep(Duration::from_millis(5)).await;
            tell.send(std::thread::current().name().map(str::to_owned)).unwrap();
        })
        .await
        .unwrap();
        assert_eq!(told.try_recv().unwrap().as_deref(), Some("short"));

        let (alive, is_gone) = mpsc::channel::<()>();
        let waiting = tokio::spawn(own_thread("long", move || async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        }));
        tokio::time::sleep(Duration::from_millis(20)).await;
        waiting.abort();
        let gone = tokio::task::spawn_blocking(move || is_gone.recv_timeout(Duration::from_secs(10)));
        assert_eq!(gone.await.unwrap(), Err(mpsc::RecvTimeoutError::Disconnected));

        let error = own_thread("bad", || async { panic!("expected by the test") }).await.unwrap_err();
        assert!(error.to_string().contains("thread bad panicked"), "{error}");
    }
}
