//! What the suites that need root ask of requests, said once.

use std::{future::Future, net::SocketAddr, time::Duration};

use crate::{
    http::{Account, Load, Running},
    netns::Namespace,
    stage::Stage,
    wait,
};
use anyhow::{Result, anyhow, ensure};

/// Drives a future with sockets of `namespace` to its end.
pub fn block_on<F, T>(namespace: &Namespace, make: impl FnOnce() -> F + Send + 'static) -> Result<T>
where
    F: Future<Output = Result<T>>,
    T: Send + 'static,
{
    namespace.spawn_async(make)?.join().map_err(|_| anyhow!("the client panicked"))?
}

/// Sends at least `count` requests to `targets` and returns their account.
pub fn request(stage: &Stage, targets: Vec<SocketAddr>, count: usize) -> Result<Account> {
    let load = Running::start(&stage.bed.client, Load::new(targets))?;
    wait::until(&format!("{count} requests have ended"), Duration::from_secs(30), || load.count() >= count)?;
    load.finish()
}

/// Fails unless every request was answered, saying what went wrong first.
pub fn ensure_none_failed(account: &Account) -> Result<()> {
    ensure!(!account.requests.is_empty(), "there were no requests");
    match account.failures().next() {
        None => Ok(()),
        Some(first) => {
            Err(anyhow!("{} of {} requests failed: {first:?}", account.failed(), account.requests.len()))
        }
    }
}

/// Fails unless each of `workers` answered at least `share` of the requests.
pub fn ensure_shared(account: &Account, workers: &[&str], share: f64) -> Result<()> {
    let counts = account.by_worker();
    let total = account.requests.len() as f64;
    for &worker in workers {
        let count = counts.get(worker).copied().unwrap_or(0);
        ensure!(count as f64 >= total * share, "{worker} answered too few: {counts:?}");
    }
    ensure!(counts.len() == workers.len(), "others answered too: {counts:?}");
    Ok(())
}
