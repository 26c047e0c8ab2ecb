//! Supervises the parts of a daemon and its signals: if one part ends, the daemon ends.

use std::{collections::HashMap, fmt::Display, future::Future, io, time::Duration};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{Id, JoinSet},
    time::{Instant, Interval, interval_at, timeout},
};

/// The tasks of a daemon, with names.
#[derive(Default)]
pub struct Tasks {
    tasks: JoinSet<Result<(), String>>,
    names: HashMap<Id, &'static str>,
}

impl Tasks {
    /// Starts a task.
    pub fn add<E: Display>(
        &mut self,
        name: &'static str,
        part: impl Future<Output = Result<(), E>> + Send + 'static,
    ) {
        let task = self.tasks.spawn(async { part.await.map_err(|e| e.to_string()) });
        self.names.insert(task.id(), name);
    }

    /// Starts a task that cannot fail.
    pub fn add_server(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        self.add(name, async {
            part.await;
            Ok::<(), std::convert::Infallible>(())
        });
    }

    /// Waits for the first task to end, and describes how it ended.
    async fn first_failure(&mut self) -> anyhow::Error {
        let (id, how) = match self.tasks.join_next_with_id().await {
            None => return std::future::pending().await,
            Some(Ok((id, Ok(())))) => (id, "ended".to_owned()),
            Some(Ok((id, Err(error)))) => (id, error),
            Some(Err(error)) => (error.id(), error.to_string()),
        };
        anyhow::anyhow!("{}: {how}", self.names.get(&id).copied().unwrap_or("unknown part"))
    }

    /// Waits up to `grace` for the named task to end, then aborts all other tasks.
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
            tracing::warn!("aborting requests in progress: they did not end in time");
        }
        self.tasks.shutdown().await;
    }
}

/// An event that a daemon reacts to.
pub enum Incident {
    /// SIGHUP was received.
    Reload,
    /// The named signal, SIGTERM or SIGINT, was received.
    Stop(&'static str),
    /// A part ended.
    Failed(anyhow::Error),
    /// It is time to notify the service manager's watchdog.
    Watchdog,
}

/// Signal handlers, and the interval of the watchdog.
pub struct Signals {
    hangup: Signal,
    terminate: Signal,
    interrupt: Signal,
    watchdog: Option<Interval>,
}

impl Signals {
    /// Registers the signal handlers.
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

    /// Waits for the next event.
    pub async fn next(&mut self, parts: &mut Tasks) -> Incident {
        let watchdog = async {
            match &mut self.watchdog {
                Some(interval) => interval.tick().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.hangup.recv() => Incident::Reload,
            _ = self.terminate.recv() => Incident::Stop("SIGTERM"),
            _ = self.interrupt.recv() => Incident::Stop("SIGINT"),
            error = parts.first_failure() => Incident::Failed(error),
            _ = watchdog => Incident::Watchdog,
        }
    }
}
