//! Runs the programs of `[[hook]]` for events. Nothing of lbd waits for one: each hook reads the stream of events at its
//! own pace, and what the stream has dropped by then is counted.

use crate::{
    desired::config::Hook,
    serve::api::events::{EventBatch, EventFilter, EventLog, EventRecord, EventSubject, HookCounts},
};
use nix::{sys::signal, unistd::Pid};
use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    process::Stdio,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, Command},
    sync::Semaphore,
    task::JoinSet,
    time::timeout,
};

/// Programs of one hook that run at the same time.
const AT_ONCE: usize = 4;
/// Events that a hook takes from the stream at once.
const BATCH: usize = 64;
/// Bytes of a program's standard error that are kept for the log.
const STDERR: usize = 1_024;
/// Time for which standard error is read after the program has ended.
const LEFT: Duration = Duration::from_millis(100);
/// Search path of the programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns why a file must not decide what runs as root: others than root, or than the user of lbd, may write it.
pub fn unsafe_file(path: &Path) -> Option<String> {
    let file = path.display();
    let found = match std::fs::metadata(path) {
        Ok(found) => found,
        Err(error) => return Some(format!("{file}: {error}")),
    };
    let us = nix::unistd::geteuid().as_raw();
    if found.uid() != 0 && found.uid() != us {
        return Some(format!(
            "{file} belongs to user {}, who is neither root nor the user of lbd",
            found.uid()
        ));
    }
    (found.mode() & 0o022 != 0)
        .then(|| format!("{file} can be written by others: run `chmod go-w {file}` and restart lbd"))
}

/// Runs the hooks until lbd stops. `socket`: the API's socket, for the programs.
pub async fn run(hooks: Vec<Hook>, log: Arc<EventLog>, socket: String) {
    let mut tasks = JoinSet::new();
    for hook in hooks {
        let counts = Arc::new(HookCounts::default());
        let name = hook.run.first().cloned().unwrap_or_default();
        log.hooks.lock().unwrap_or_else(PoisonError::into_inner).push((name, counts.clone()));
        tasks.spawn(follow(Arc::new(hook), log.clone(), counts, socket.clone()));
    }
    while tasks.join_next().await.is_some() {}
    // Without hooks there is nothing to do, but a part of lbd must not end.
    std::future::pending().await
}

/// Starts one hook's program for each of its events.
async fn follow(hook: Arc<Hook>, log: Arc<EventLog>, counts: Arc<HookCounts>, socket: String) {
    let filter = EventFilter { kinds: hook.on.clone(), service: None };
    let permits = Arc::new(Semaphore::new(AT_ONCE));
    let mut running = JoinSet::new();
    let (mut newest, mut seq) = (log.watch(), 0);
    loop {
        newest.mark_unchanged();
        let EventBatch { missed, events } = log.after(seq, BATCH);
        if missed > 0 {
            counts.missed.fetch_add(missed, Ordering::Relaxed);
            tracing::warn!(
                hook = hook.run[0],
                missed,
                "events were dropped: the hook's programs take too long"
            );
        }
        match events.last() {
            Some(last) => seq = last.seq,
            None if newest.changed().await.is_err() => return,
            None => continue,
        }
        for event in events.into_iter().filter(|event| filter.selects(event)) {
            let Ok(permit) = permits.clone().acquire_owned().await else { return };
            let (hook, counts, socket) = (hook.clone(), counts.clone(), socket.clone());
            running.spawn(async move {
                let outcome = start(&hook, &event, &socket).await;
                count(&hook, &event, &counts, outcome);
                drop(permit);
            });
            while running.try_join_next().is_some() {}
        }
    }
}

/// How a program ended.
#[derive(Debug, PartialEq, Eq)]
enum HookOutcome {
    Ok,
    Failed(String),
    Timeout,
}

fn count(hook: &Hook, event: &EventRecord, counts: &HookCounts, outcome: HookOutcome) {
    let add = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
    let (program, kind, seq) = (&hook.run[0], &event.kind, event.seq);
    match outcome {
        HookOutcome::Ok => drop(add(&counts.ok)),
        HookOutcome::Failed(why) => {
            add(&counts.failed);
            tracing::warn!(hook = program, event = %kind, seq, "hook failed: {why}");
        }
        HookOutcome::Timeout => {
            add(&counts.timeout);
            let timeout_s = hook.timeout_s;
            tracing::warn!(hook = program, event = %kind, seq, timeout_s, "hook took too long and was killed");
        }
    }
}

/// A program in a process group of its own, which is killed with it.
struct HookProcess(Child);

impl Drop for HookProcess {
    fn drop(&mut self) {
        // Only as long as the program was not waited for: afterwards its number may be that of another process.
        if let Some(id) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            let _ = signal::killpg(Pid::from_raw(id), signal::Signal::SIGKILL);
        }
    }
}

/// Runs a hook's program for an event.
async fn start(hook: &Hook, event: &EventRecord, socket: &str) -> HookOutcome {
    let mut command = Command::new(&hook.run[0]);
    command.args(&hook.run[1..]).env_clear().current_dir("/").process_group(0).kill_on_drop(true);
    command.env("PATH", PATH).env("LB_EVENT", &*event.kind).env("LB_EVENT_ID", event.id().to_string());
    let EventSubject { service, backend, interface, vip, region } = &event.subject;
    let socket = Some(socket.to_owned());
    for (name, value) in [
        ("LB_SERVICE", service),
        ("LB_BACKEND", backend),
        ("LB_INTERFACE", interface),
        ("LB_VIP", vip),
        ("LB_REGION", region),
        ("LB_SOCKET", &socket),
    ] {
        if let Some(value) = value {
            command.env(name, value);
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut group = match command.spawn() {
        Ok(child) => HookProcess(child),
        Err(error) => return HookOutcome::Failed(format!("cannot start it: {error}")),
    };
    let mut text = serde_json::to_vec(event).expect("an event has a JSON form");
    text.push(b'\n');
    let (stdin, stderr) = (group.0.stdin.take(), group.0.stderr.take());
    let mut said = Vec::new();
    let ended = {
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A program need not read the event.
                let _ = stdin.write_all(&text).await;
            }
        };
        let read = async {
            let Some(mut stderr) = stderr else { return };
            let mut piece = [0; 256];
            // All of it is read, or the program would wait; not all of it is kept.
            while let Ok(n @ 1..) = stderr.read(&mut piece).await {
                let room = STDERR.saturating_sub(said.len());
                said.extend_from_slice(&piece[..n.min(room)]);
            }
        };
        let io = async { tokio::join!(feed, read) };
        tokio::pin!(io);
        timeout(Duration::from_secs(hook.timeout_s.into()), async {
            tokio::select! {
                _ = &mut io => group.0.wait().await,
                status = group.0.wait() => {
                    // A process that the program leaves behind may keep standard error open.
                    let _ = timeout(LEFT, &mut io).await;
                    status
                }
            }
        })
        .await
    };
    let said = String::from_utf8_lossy(&said).trim().to_owned();
    match ended {
        Err(_) => HookOutcome::Timeout,
        Ok(Ok(status)) if status.success() => HookOutcome::Ok,
        Ok(Ok(status)) if said.is_empty() => HookOutcome::Failed(status.to_string()),
        Ok(Ok(status)) => HookOutcome::Failed(format!("{status}: {said}")),
        Ok(Err(error)) => HookOutcome::Failed(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::fs::PermissionsExt, time::Instant};

    fn event() -> EventRecord {
        let subject = EventSubject {
            service: Some("web".to_owned()),
            backend: Some("w1".to_owned()),
            ..EventSubject::default()
        };
        let (boot, cause) = ("0123abcd".to_owned(), "no\nanswer".to_owned());
        EventRecord { seq: 7, boot, time_ms: 1, kind: "backend.down".into(), subject, cause, revision: 3 }
    }

    fn hook(script: &str) -> Hook {
        let run = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        Hook { on: vec!["backend".to_owned()], run, timeout_s: 1 }
    }

    #[tokio::test]
    async fn a_program_gets_the_event_and_nothing_of_lbds_environment() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name).display().to_string();
        let script = format!("cat > {}; env > {}", file("event"), file("env"));
        assert_eq!(start(&hook(&script), &event(), "/run/s").await, HookOutcome::Ok);
        let read: EventRecord = serde_json::from_slice(&std::fs::read(file("event")).unwrap()).unwrap();
        assert_eq!(read, event());
        let env = std::fs::read_to_string(file("env")).unwrap();
        let names: std::collections::BTreeSet<&str> =
            env.lines().filter_map(|line| Some(line.split_once('=')?.0)).collect();
        let ours = ["LB_BACKEND", "LB_EVENT", "LB_EVENT_ID", "LB_SERVICE", "LB_SOCKET", "PATH", "PWD"];
        // Shells set some of their own.
        let of_shell = ["_", "SHLVL", "OLDPWD"];
        assert!(names.iter().all(|name| ours.contains(name) || of_shell.contains(name)), "{env}");
        assert!(env.contains("LB_EVENT=backend.down\n") && env.contains("LB_SERVICE=web\n"), "{env}");
        assert!(env.contains("LB_EVENT_ID=0123abcd-7\n"), "{env}");
    }

    #[tokio::test]
    async fn failures_are_told_with_what_the_program_said() {
        let outcome = start(&hook("echo no mail >&2; exit 3"), &event(), "").await;
        assert_eq!(outcome, HookOutcome::Failed("exit status: 3: no mail".to_owned()));
        let endless = "head -c 300000 /dev/zero | tr '\\0' x >&2; exit 1";
        let HookOutcome::Failed(said) = start(&hook(endless), &event(), "").await else { panic!() };
        assert!(said.len() < STDERR + 40, "{}", said.len());
        let missing = Hook { run: vec!["/nowhere/hook".to_owned()], ..hook("") };
        assert!(
            matches!(start(&missing, &event(), "").await, HookOutcome::Failed(why) if why.contains("cannot start"))
        );
        // It does not read the event.
        assert_eq!(start(&hook("exec <&-; exit 0"), &event(), "").await, HookOutcome::Ok);
    }

    #[tokio::test]
    async fn the_process_group_is_killed_at_the_timeout() {
        let directory = tempfile::tempdir().unwrap();
        let late = directory.path().join("late");
        let script = format!("(sleep 2; touch {}) & wait", late.display());
        let began = Instant::now();
        assert_eq!(start(&hook(&script), &event(), "").await, HookOutcome::Timeout);
        assert!(began.elapsed() < Duration::from_millis(1_900), "{:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        assert!(!late.exists(), "a child of the program goes on");
    }

    #[test]
    fn files_that_others_may_write_start_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("lbd.toml");
        std::fs::write(&file, "").unwrap();
        let set = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        set(0o600);
        assert_eq!(unsafe_file(&file), None);
        for mode in [0o620, 0o602, 0o666] {
            set(mode);
            assert!(unsafe_file(&file).is_some_and(|why| why.contains("chmod go-w")), "{mode:o}");
        }
        assert!(unsafe_file(&directory.path().join("none")).is_some());
    }
}
