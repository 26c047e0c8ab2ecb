//! `lbctl rollout lock -- COMMAND`: runs a command while the lock is renewed.
//!
//! ForwardedSignals that would end lbctl go to the command, and the lock is released once it has ended; its exit status is
//! lbctl's. If the lock is lost, everything that the command has started is ended. A renewal that hangs ends well before
//! the lock expires.

use super::{Context, Exit, Failure};
use crate::{
    desired::store::Lock,
    lbctl::client::{ApiClient, LOCK_TOKEN_VARIABLE},
    serve::api::locks::{HeldLock, LockRequest, Unlock},
};
use nix::{
    errno::Errno,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use reqwest::Method;
use std::{io, os::unix::process::ExitStatusExt, process::ExitStatus, time::Duration};
use tokio::{
    process::{Child, Command},
    signal::unix::{SignalKind, signal},
    time::Instant,
};

/// Time that the command has to end by itself after the lock is lost.
const GRACE: Duration = Duration::from_secs(5);

/// Runs `command` under the lock at `path`, which `request` renews, and releases the lock.
pub async fn run(
    context: &mut Context<'_>,
    path: &str,
    request: &LockRequest,
    command: &[String],
) -> Result<Exit, Failure> {
    let ended = match LockedCommand::start(request, command) {
        Ok(mut running) => running.wait(&context.client, path, request).await,
        Err(error) => Err(cannot_run(command, &error)),
    };
    let query = Unlock { token: request.token.clone(), force: false };
    let released = context.client.send::<Vec<HeldLock>>(Method::DELETE, path, &query, None::<&()>).await;
    let status = ended?;
    released?;
    // As shells have it: a command that a signal ended.
    let code = status.code().or_else(|| status.signal().map(|number| 128 + number));
    Ok(Exit::Of(u8::try_from(code.unwrap_or(1)).unwrap_or(1)))
}

fn cannot_run(command: &[String], error: &io::Error) -> Failure {
    Failure::Refused { what: format!("cannot run {}: {error}", command[0]), fix: None, details: Vec::new() }
}

/// The command, in a process group of its own unless it shares a terminal with lbctl: then it may read from it, and the
/// terminal's signals reach both.
struct LockedCommand<'a> {
    command: &'a [String],
    child: Child,
    group: Option<Pid>,
    signals: ForwardedSignals,
}

impl<'a> LockedCommand<'a> {
    fn start(request: &LockRequest, command: &'a [String]) -> io::Result<Self> {
        use std::io::IsTerminal;
        let has_terminal = io::stdin().is_terminal();
        let signals = ForwardedSignals::new(has_terminal)?;
        let mut start = Command::new(&command[0]);
        start.args(&command[1..]).kill_on_drop(true);
        if !has_terminal {
            start.process_group(0);
        }
        // Requests that the command sends to lbd use this lock instead of conflicting with it.
        if let Some(token) = &request.token {
            start.env(LOCK_TOKEN_VARIABLE, token);
        }
        let child = start.spawn()?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        Ok(Self { command, child, group: pid.filter(|_| !has_terminal), signals })
    }

    /// Renews the lock until the command has ended.
    async fn wait(
        &mut self,
        client: &ApiClient,
        path: &str,
        request: &LockRequest,
    ) -> Result<ExitStatus, Failure> {
        let every = Duration::from_secs(request.ttl_s.div_ceil(3));
        let client = client.with_timeout(every / 2);
        let (mut last, mut next) = (Instant::now(), Instant::now() + every);
        loop {
            tokio::select! {
                status = self.child.wait() => return status.map_err(|error| cannot_run(self.command, &error)),
                number = self.signals.next() => {
                    self.send(number);
                    continue;
                }
                () = tokio::time::sleep_until(next) => {}
            }
            next = Instant::now() + every;
            match client.send::<Lock>(Method::POST, path, &(), Some(request)).await {
                Ok(_) => last = Instant::now(),
                // The lock has not expired yet if lbd restarts or is disconnected for a moment.
                Err(error) if last.elapsed() + every + every / 2 < Duration::from_secs(request.ttl_s) => {
                    say!("cannot renew the lock yet, trying again: {error}");
                    next = Instant::now() + every / 4;
                }
                Err(error) => {
                    say!("the lock is lost: ending the command");
                    self.end().await;
                    return Err(error.into());
                }
            }
        }
    }

    fn send(&self, number: Signal) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).map(Pid::from_raw);
        let sent = match (self.group, pid) {
            (Some(group), _) => killpg(group, number),
            (None, Some(pid)) => nix::sys::signal::kill(pid, number),
            (None, None) => Ok(()),
        };
        if let Err(error) = sent.or_else(|error| if error == Errno::ESRCH { Ok(()) } else { Err(error) }) {
            say!("cannot send {number} to the command: {error}");
        }
    }

    async fn end(&mut self) {
        self.send(Signal::SIGTERM);
        let _ = tokio::time::timeout(GRACE, self.child.wait()).await;
        // Whatever it has left behind, too.
        self.send(Signal::SIGKILL);
        let _ = self.child.wait().await;
    }
}

/// ForwardedSignals that would end lbctl. The terminal sends SIGINT and SIGQUIT to the command itself.
struct ForwardedSignals {
    streams: Vec<(Signal, tokio::signal::unix::Signal)>,
    /// Of the first streams: those that are taken and not sent on.
    ignored: usize,
}

impl ForwardedSignals {
    fn new(has_terminal: bool) -> io::Result<Self> {
        let all = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGHUP];
        let streams = all.map(|number| Ok((number, signal(SignalKind::from_raw(number as i32))?)));
        let streams = streams.into_iter().collect::<io::Result<_>>()?;
        Ok(Self { streams, ignored: if has_terminal { 2 } else { 0 } })
    }

    /// The next signal to send on.
    async fn next(&mut self) -> Signal {
        std::future::poll_fn(|cx| {
            for (i, (number, stream)) in self.streams.iter_mut().enumerate() {
                while stream.poll_recv(cx).is_ready() {
                    if i >= self.ignored {
                        return std::task::Poll::Ready(*number);
                    }
                }
            }
            std::task::Poll::Pending
        })
        .await
    }
}
