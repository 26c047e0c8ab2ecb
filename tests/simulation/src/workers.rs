//! The workers behind the balancer: what probes and streams of reports meet.

use super::{bugs::Bug, environment};
use futures_util::future::BoxFuture;
use lb_userspace::observed::{
    dial::{Dial, WorkerStream},
    health::{Outcome, ProbeStep, Prober},
    regions::rtt::Meter,
};
use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// How a worker treats the order of its reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reporting {
    /// In order.
    #[default]
    Fresh,
    /// Now and then, reports of an earlier time that say the replica is ready.
    Stale,
    /// Each report twice.
    Repeated,
    /// Something else than a report now and then.
    Garbage,
    /// None, over an open connection.
    Silent,
}

/// One worker.
#[derive(Clone, Debug)]
pub struct Worker {
    pub is_alive: bool,
    /// When `is_alive` or `delay` changed last.
    pub since: Duration,
    /// Time until it answers a probe.
    pub delay: Duration,
    pub phase: &'static str,
    /// When `phase` changed last.
    pub phase_since: Duration,
    pub reporting: Reporting,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            is_alive: true,
            since: environment::ORIGIN,
            delay: Duration::from_millis(2),
            phase: "ready",
            phase_since: environment::ORIGIN,
            reporting: Reporting::Fresh,
        }
    }
}

/// All workers, by address.
#[derive(Clone, Default)]
pub struct Workers(Arc<Mutex<BTreeMap<IpAddr, Worker>>>);

impl Workers {
    pub fn get(&self, address: IpAddr) -> Worker {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&address).cloned().unwrap_or_default()
    }

    pub fn change(&self, address: IpAddr, change: impl FnOnce(&mut Worker)) {
        change(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(address).or_default());
    }

    /// Makes all workers well.
    pub fn heal(&self) {
        let now = environment::now();
        for worker in self.0.lock().unwrap_or_else(PoisonError::into_inner).values_mut() {
            let healthy = Worker::default();
            if !worker.is_alive || worker.delay != healthy.delay {
                worker.since = now;
            }
            (worker.is_alive, worker.delay, worker.reporting) = (true, healthy.delay, Reporting::Fresh);
        }
    }

    /// Probes of health checks.
    pub fn prober(&self) -> Prober {
        let workers = self.clone();
        Arc::new(move |target| {
            let workers = workers.clone();
            Box::pin(async move {
                if target.kind.is_none() {
                    return ProbeStep::Done(Outcome::Passed("not checked".to_owned()));
                }
                let worker = workers.get(target.address.ip());
                tokio::time::sleep(worker.delay.min(target.timeout)).await;
                ProbeStep::Done(if worker.delay >= target.timeout {
                    Outcome::Failed(format!("no connection within {} ms", target.timeout.as_millis()))
                } else if worker.is_alive {
                    Outcome::Passed("connected".to_owned())
                } else {
                    Outcome::Failed("connection refused".to_owned())
                })
            })
        })
    }

    /// Round-trip times of regions.
    pub fn meter(&self) -> Meter {
        let workers = self.clone();
        Arc::new(move |address| {
            let is_alive = workers.get(address.ip()).is_alive;
            Box::pin(async move { is_alive.then_some(Duration::from_millis(20)) })
        })
    }

    /// Connections to replicas.
    pub fn dial(&self, bug: Option<Bug>) -> Dial {
        let workers = self.clone();
        Arc::new(move |address| connect(workers.clone(), address, bug))
    }
}

fn connect(
    workers: Workers,
    address: SocketAddr,
    bug: Option<Bug>,
) -> BoxFuture<'static, io::Result<Box<dyn WorkerStream>>> {
    Box::pin(async move {
        tokio::time::sleep(Duration::from_millis(1)).await;
        if !workers.get(address.ip()).is_alive {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        tokio::spawn(serve(workers, address.ip(), theirs, bug));
        Ok(Box::new(ours) as Box<dyn WorkerStream>)
    })
}

fn report(phase: &str, time_ms: u128) -> String {
    format!(
        "data: {{\"protocol\":1,\"phase\":\"{phase}\",\"model\":\"m\",\"version\":\"1\",\"running\":1,\"waiting\":0,\
         \"capacity\":{{\"running\":8,\"waiting\":64}},\"time_ms\":{time_ms}}}\n\n"
    )
}

/// Serves one stream of reports until the worker dies or the client leaves.
async fn serve(workers: Workers, address: IpAddr, mut stream: tokio::io::DuplexStream, bug: Option<Bug>) {
    let mut request = [0; 4_096];
    if !matches!(stream.read(&mut request).await, Ok(n) if n > 0) {
        return;
    }
    let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n";
    if stream.write_all(head.as_bytes()).await.is_err() {
        return;
    }
    for count in 0u64.. {
        let worker = workers.get(address);
        if !worker.is_alive {
            return;
        }
        let now_ms = environment::now().as_millis();
        let fresh = report(worker.phase, now_ms);
        let text = match worker.reporting {
            Reporting::Stale if count % 2 == 1 => {
                // The client can tell by the time only.
                let time_ms = if bug == Some(Bug::StaleReportsApplied) { now_ms } else { now_ms - 10_000 };
                report("ready", time_ms)
            }
            Reporting::Repeated => fresh.clone() + &fresh,
            Reporting::Garbage if count % 3 == 2 => "data: {\"protocol\":1,\"phase\":7}\n\n".to_owned(),
            Reporting::Silent => String::new(),
            _ => fresh,
        };
        if !text.is_empty() && stream.write_all(text.as_bytes()).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
