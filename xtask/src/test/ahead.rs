//! Builds what the last suite needs while suites that mostly wait are running.
//!
//! Tests of real traffic leave processors idle. The builds run in the scheduler's idle class, so they take only what
//! nothing else wants, and in the release profile, whose folder no other suite uses: cargo locks each folder.

use std::{fs::File, process::Command, thread::JoinHandle, time::Instant};

use anyhow::{Context, Result};

use crate::shell;

/// Builds that run in the background.
pub struct Ahead(JoinHandle<()>);

impl Ahead {
    /// Starts the builds, one after the other. Their output goes to `target/ahead.log`; what fails here fails again, and
    /// is shown, when its suite builds it.
    pub fn start(what: &str, builds: Vec<Command>) -> Result<Self> {
        let log = shell::workspace().join("target/ahead.log");
        let log = File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let builds: Vec<Command> = builds
            .iter()
            .map(|build| idle(build, &log))
            .collect::<Result<_>>()
            .context("cannot share the log")?;
        println!("building {what} meanwhile, with idle processors only: see target/ahead.log");
        Ok(Self(std::thread::spawn(move || {
            for mut build in builds {
                if !build.status().is_ok_and(|status| status.success()) {
                    return;
                }
            }
        })))
    }

    /// Waits until the builds have ended.
    pub fn finish(self) {
        let began = Instant::now();
        // A build that ended in any way is repeated by its suite.
        let _ = self.0.join();
        println!("waited {:.0} s for builds in the background", began.elapsed().as_secs_f32());
    }
}

/// A command that does the same in the idle class, and writes to `log`.
fn idle(command: &Command, log: &File) -> Result<Command> {
    let prefix: &[&str] =
        if shell::which("chrt").is_some() { &["chrt", "--idle", "0"] } else { &["nice", "-n", "19"] };
    let mut idle = Command::new(prefix[0]);
    idle.args(&prefix[1..]).arg(command.get_program()).args(command.get_args());
    idle.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
    idle.current_dir(command.get_current_dir().unwrap_or(&shell::workspace()));
    idle.stdout(log.try_clone()?).stderr(log.try_clone()?);
    Ok(idle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_idle_is_the_same_command() {
        let path = std::env::temp_dir().join(format!("xtask-ahead-{}", std::process::id()));
        let log = File::create(&path).expect("a temporary file");
        let mut command = Command::new("sh");
        // Niceness and scheduling policy; SCHED_IDLE is 5.
        command.args(["-c", "echo $WORD; pwd; cut -d' ' -f19,41 /proc/self/stat"]);
        command.env("WORD", "w").current_dir("/");
        assert!(idle(&command, &log).expect("a copy").status().expect("sh").success());
        let text = std::fs::read_to_string(&path).expect("text");
        std::fs::remove_file(&path).expect("the file is there");
        let class = text.strip_prefix("w\n/\n").expect("the same words and folder").trim();
        assert!(class.starts_with("19 ") || class.ends_with(" 5"), "{class}");
    }
}
