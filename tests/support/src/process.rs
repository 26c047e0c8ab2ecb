//! A child process that does not outlive its owner, with its output in a file.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};

use crate::wait;

/// Lets the kernel kill the program that `command` becomes when the calling thread ends.
pub fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl with these arguments only sets a flag of the child and
    // is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
}

/// A running program; killed by its id when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`, called `name` in messages, with both outputs appended
    /// to `log`. The kernel kills it should the calling thread die first.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        die_with_parent(&mut command);
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cannot duplicate a descriptor")?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name} ({})", command.get_program().to_string_lossy()))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has printed so far.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        signal::kill(Pid::from_raw(self.id().cast_signed()), signal)
            .with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Sends `signal` and waits for the end it brings.
    pub fn stop(&mut self, signal: Signal, timeout: Duration) -> Result<ExitStatus> {
        self.signal(signal)?;
        let what = format!("{} ends after {signal}", self.name);
        wait::until_some(&what, timeout, || self.child.try_wait().ok().flatten())
    }

    /// Waits until `is_ready`, and fails at once with its last words when the
    /// process ends instead.
    pub fn wait_ready(
        &mut self,
        what: &str,
        timeout: Duration,
        mut is_ready: impl FnMut() -> bool,
    ) -> Result<Duration> {
        let mut ended = None;
        let waited = wait::until(what, timeout, || {
            ended = self.child.try_wait().ok().flatten();
            ended.is_some() || is_ready()
        });
        match (ended, waited) {
            (Some(status), _) => bail!("{} ended early ({status}):\n{}", self.name, self.output()),
            (None, Err(error)) => Err(error.context(format!("{} said:\n{}", self.name, self.output()))),
            (None, Ok(elapsed)) => Ok(elapsed),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
