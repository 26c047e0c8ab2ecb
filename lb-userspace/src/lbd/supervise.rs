//! The parts of a daemon, and the signals it gets: if one part ends, the whole does.

use std::{collections::HashMap, fmt::Display, future::Future, io, time::Duration};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{Id, JoinSet},
    time::{Instant, Interval, interval_at, timeout},
};

/// Tasks with names.
#[derive(Default)]
pub struct Parts {
    tasks: JoinSet<Result<(), String>>,
    names: HashMap<Id, &'static str>,
}

impl Parts {
    /// Starts one.
    pub fn add<E: Display>(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let task = self.tasks.spawn(async { part.await.map_err(|e| e.to_string()) });
        self.names.insert(task.id(), name);
    }

    /// The first that ends, and how.
    async fn ended(&mut self) -> anyhow::Error {
        let (id, how) = match self.tasks.join_next_with_id().await {
            None => return std::future::pending().await,
            Some(Ok((id, Ok(())))) => (id, "ended".to_owned()),
            Some(Ok((id, Err(error)))) => (id, error),
            Some(Err(error)) => (error.id(), error.to_string()),
        };
        anyhow::anyhow!("{}: {how}", self.names.get(&id).copied().unwrap_or("a part"))
    }

    /// Waits for one to end by itself, then stops the rest.
    pub async fn finish(&mut self, name: &'static str, grace: Duration) {
        let wait = async {
            while let Some(result) = self.tasks.join_next_with_id().await {
                let id = result.map_or_else(|e| e.id(), |(id, _)| id);
                if self.names.get(&id) == Some(&name) {
                    return;
                }
            }
        };
        if timeout(grace, wait).await.is_err() {
            tracing::warn!("requests in progress took too long, and are cut off");
        }
        self.tasks.shutdown().await;
    }
}

/// What a daemon reacts to.
pub enum Happened {
    /// SIGHUP.
    Reload,
    /// SIGTERM or SIGINT.
    Stop(&'static str),
    /// A part has ended.
    Failed(anyhow::Error),
    /// The service manager wants to hear that all is well.
    Watchdog,
}

/// Signals and the watchdog's clock.
pub struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    watchdog: Option<Interval>,
}

impl Signals {
    /// From now on signals come here.
    pub fn new() -> io::Result<Self> {
        // Half the time that the service manager allows.
        let period = sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|p| !p.is_zero());
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            watchdog: period.map(|p| interval_at(Instant::now() + p, p)),
        })
    }

    /// What happens next.
    pub async fn next(&mut self, parts: &mut Parts) -> Happened {
        let watchdog = async {
            match &mut self.watchdog {
                Some(interval) => interval.tick().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.hangup.recv() => Happened::Reload,
            _ = self.terminate.recv() => Happened::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Happened::Stop("SIGINT"),
            error = parts.ended() => Happened::Failed(error),
            _ = watchdog => Happened::Watchdog,
        }
    }
}
