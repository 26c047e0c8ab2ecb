//! The `lbctl` binary, end to end over a real socket, store and API, with an engine that needs no kernel.
//!
//! Each file in `tests/cli/` runs against a daemon of its own. `TRYCMD=overwrite cargo test --test cli`
//! writes the output into the files; replace parts that vary
//! between runs by `[..]`.

#![allow(clippy::unwrap_used, reason = "a test file, helpers included")]

use lb_userspace::{
    desired::{
        model::Locality,
        store::{Opener, RedbStore, Store, etcd::Access},
    },
    observed::{
        health::{Checker, HealthRegistry, prober},
        regions::RegionController,
    },
    serve::api::{
        self, Control,
        memory::MemoryEngine,
        store::{FleetMember, HostReport},
    },
};
use std::{path::Path, sync::Arc};

/// Starts a daemon without a dataplane in a directory; it stops with the test's process.
fn start(directory: &Path) -> std::path::PathBuf {
    let socket = directory.join("lbd.sock");
    let (ready, started) = std::sync::mpsc::channel();
    let (state, path) = (directory.to_owned(), socket.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Arc::new(RedbStore::open(&state, 100).unwrap());
            let book = Arc::new(HealthRegistry::default());
            let (verdicts, mut told) = tokio::sync::mpsc::channel(100);
            tokio::spawn(async move { while told.recv().await.is_some() {} });
            let checker = Checker::new(book.clone(), 10, prober(), verdicts);
            tokio::spawn(checker.run(store.watch(), store.clone()));
            let opener = Opener { local: store.local(), keep: 100, access: Access::default(), id: None };
            let local = store.local();
            let control = Control::new(store.clone(), Arc::new(MemoryEngine::new(5)), book.clone());
            let here = Locality { region: "eu".parse().unwrap(), zone: "a".parse().unwrap() };
            let books = (book, control.replicas().clone());
            let steering =
                RegionController::new((here, "ingress-1".to_owned()), store, Arc::new(local), books).await;
            control.set_region_decisions(steering.snapshots());
            let (steers, mut steered) =
                tokio::sync::mpsc::channel::<lb_userspace::apply::reconcile::Event>(100);
            tokio::spawn(async move { while steered.recv().await.is_some() {} });
            tokio::spawn(steering.run(control.clone(), steers));
            let named = |name: &str| name.to_owned();
            let (host, region, zone) = (named("ingress-1"), named("eu"), named("a"));
            control.set_fleet_member(FleetMember {
                host: host.clone(),
                region: region.clone(),
                zone: zone.clone(),
                opener,
            });
            control.publish_report(HostReport { host, region, zone, ..HostReport::default() });
            tokio::spawn(control.clone().run_member());
            tokio::spawn(control.clone().run_apply_loop());
            control.wait_first_applied().await;
            tokio::spawn(control.clone().run_events());
            let (listener, writers) = api::bind(&path, 0o660, None).unwrap();
            ready.send(()).unwrap();
            api::serve(listener, control, writers, std::future::pending()).await;
        });
    });
    started.recv().unwrap();
    socket
}

/// Runs one file of commands against a fresh daemon.
fn run(file: &str) {
    let directory = tempfile::tempdir().unwrap();
    let socket = start(directory.path());
    let cases = trycmd::TestCases::new();
    // A daemon that is told of a bad file looks for a stored state.
    let state = directory.path().join("other").display().to_string();
    cases.env("LBD_SOCKET", socket.display().to_string()).env("LBD_STATE_DIR", state);
    cases.env("COLUMNS", "100").case(file);
}

/// A signal for lbctl goes to the command that runs under the lock, and to all that this has started; the lock is released
/// when the command has ended, and its exit status is lbctl's.
#[test]
fn a_signal_ends_the_command_before_its_lock() {
    use nix::{
        sys::signal::{Signal, kill},
        unistd::Pid,
    };
    use std::{
        io::{BufRead, BufReader},
        process::{Command, Stdio},
    };
    let directory = tempfile::tempdir().unwrap();
    let socket = start(directory.path());
    let lbctl = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lbctl"));
        command.env("LBD_SOCKET", &socket).stdin(Stdio::null());
        command
    };
    let script = "trap 'lbctl=$(\"$0\" rollout status rollout); echo \"$lbctl\"; exit 9' TERM; sleep 61 & echo $!; wait";
    let mut locked = lbctl();
    locked.args(["rollout", "lock", "--", "sh", "-c", script, env!("CARGO_BIN_EXE_lbctl")]);
    let mut locked = locked.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(locked.stdout.take().unwrap()).lines().map(Result::unwrap);
    let sleeper = Pid::from_raw(lines.next().unwrap().parse().unwrap());
    kill(Pid::from_raw(locked.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    let while_it_ends: Vec<String> = lines.collect();
    assert_eq!(locked.wait().unwrap().code(), Some(9));
    assert!(while_it_ends.concat().contains("no reason given"), "held until then: {while_it_ends:?}");
    // Its parent has ended: it exists until init has noticed.
    let is_gone = (0..250).any(|_| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        kill(sleeper, None).is_err()
    });
    assert!(is_gone, "the whole group got the signal");
    let status = lbctl().args(["rollout", "status", "rollout"]).status().unwrap();
    assert!(status.success(), "the lock is free");
}

#[test]
fn regions() {
    run("tests/cli/regions.trycmd");
}

#[test]
fn services_and_backends() {
    run("tests/cli/services.trycmd");
}

#[test]
fn mistakes() {
    run("tests/cli/mistakes.trycmd");
}

#[test]
fn configuration_files() {
    run("tests/cli/config.trycmd");
}

#[test]
fn configurations_of_other_load_balancers() {
    run("tests/cli/import.trycmd");
}

#[test]
fn observation() {
    run("tests/cli/observe.trycmd");
}

#[test]
fn replicas() {
    run("tests/cli/replicas.trycmd");
}

#[test]
fn daemon_arguments() {
    run("tests/cli/lbd.trycmd");
}

#[test]
fn help() {
    run("tests/cli/help.trycmd");
}

/// Runs the binary under test with a pipe whose reader has closed.
#[test]
fn a_reader_that_leaves_is_no_error() {
    use std::process::{Command, Stdio};
    for arguments in [&["completions", "bash"][..], &["--help"]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_lbctl"))
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(0),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert_eq!(output.stderr, b"");
    }
}

#[test]
fn completions_and_man_pages_are_written() {
    let lbctl = |arguments: &[&str]| {
        std::process::Command::new(env!("CARGO_BIN_EXE_lbctl")).args(arguments).output().unwrap()
    };
    for shell in ["bash", "zsh", "fish"] {
        let output = lbctl(&["completions", shell]);
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && script.contains("LBCTL_COMPLETE"), "{shell}: {script}");
    }
    let directory = tempfile::tempdir().unwrap();
    let pages = directory.path().join("man");
    assert!(lbctl(&["man", pages.to_str().unwrap()]).status.success());
    let page = std::fs::read_to_string(pages.join("lbctl-backend-drain.1")).unwrap();
    assert!(page.contains(".TH") && page.contains("if\\-revision"), "{page}");
    let top = std::fs::read_to_string(pages.join("lbctl.1")).unwrap();
    assert!(top.contains("Exit codes"), "{top}");
    assert!(std::fs::read_to_string(pages.join("lbd-worker.1")).unwrap().contains("gue"));
}

/// Words that bash offers for the last of these words.
fn completed(socket: &Path, words: &[&str]) -> Vec<String> {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lbctl"));
    command.env("LBD_SOCKET", socket).env("LBCTL_COMPLETE", "bash").arg("--").arg("lbctl").args(words);
    command.env("_CLAP_COMPLETE_INDEX", words.len().to_string()).env("_CLAP_COMPLETE_COMP_TYPE", "9");
    command.env("_CLAP_IFS", "\n").env("_CLAP_COMPLETE_SPACE", "true");
    let output = command.output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(|line| line.trim().to_owned()).collect()
}

#[test]
fn names_and_values_are_completed() {
    let directory = tempfile::tempdir().unwrap();
    let socket = start(directory.path());
    for name in ["chat", "check"] {
        let vip = format!("10.0.0.{}:80/tcp", name.len());
        assert_eq!(lbctl(&socket, &["service", "add", name, "--vip", &vip]).0, 0);
    }
    lbctl(&socket, &["backend", "add", "chat", "gpu-1", "10.1.0.1"]);
    lbctl(&socket, &["backend", "add", "check", "cpu-1", "10.1.0.2"]);
    let words = |words: &[&str]| completed(&socket, words);
    assert_eq!(words(&["backend", "drain", "ch"]), ["chat", "check"]);
    assert_eq!(words(&["backend", "drain", "chat", ""])[0], "gpu-1");
    assert!(!words(&["backend", "drain", "chat", ""]).contains(&"cpu-1".to_owned()));
    assert_eq!(words(&["flows", "--service", "che"]), ["check"]);
    assert_eq!(words(&["service", "rm", "chat"]), ["chat"]);
    assert_eq!(words(&["service", "set", "chat", "--mode", "g"]), ["gue"]);
    assert!(words(&["service", "add", "new", "--on-down", ""]).contains(&"keep".to_owned()));
    assert_eq!(words(&["backe"]), ["backend"]);
    // Without lbd there are no names, and no wait.
    let began = std::time::Instant::now();
    assert!(completed(Path::new("/nowhere"), &["backend", "drain", "ch"]).is_empty());
    assert!(began.elapsed() < std::time::Duration::from_secs(5));
}

#[test]
fn store() {
    run("tests/cli/store.trycmd");
}

/// Runs `lbctl` against a socket; returns exit code and output.
fn lbctl(socket: &Path, arguments: &[&str]) -> (i32, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lbctl"));
    let output = command.env("LBD_SOCKET", socket).args(arguments).output().unwrap();
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap(), said)
}

#[test]
fn a_backup_is_written_once_and_brought_back() {
    let directory = tempfile::tempdir().unwrap();
    let (one, two) = (directory.path().join("one"), directory.path().join("two"));
    std::fs::create_dir_all(&one).unwrap();
    std::fs::create_dir_all(&two).unwrap();
    let (one, two) = (start(&one), start(&two));
    let file = directory.path().join("lb.backup").display().to_string();
    lbctl(&one, &["service", "add", "web", "--vip", "10.0.0.1:80/tcp"]);
    lbctl(&one, &["backend", "add", "web", "w1", "10.1.0.1"]);
    let export = lbctl(&one, &["config", "export"]);
    let (code, said) = lbctl(&one, &["store", "backup", &file]);
    assert!(code == 0 && said.contains("2 revisions, up to 2"), "{said}");
    let (code, said) = lbctl(&one, &["store", "backup", &file]);
    assert!(code == 4 && said.contains("File exists"), "{said}");
    // Into the store of the backup: one more revision.
    lbctl(&one, &["backend", "rm", "web", "w1"]);
    let (code, said) = lbctl(&one, &["store", "restore", &file, "--dry-run"]);
    assert!(code == 0 && said.contains("+ backend web/w1"), "{said}");
    let (code, said) = lbctl(&one, &["store", "restore", &file, "--if-revision", "2"]);
    assert!(code == 4 && said.contains("at revision 3 by now, not 2"), "{said}");
    let (code, said) = lbctl(&one, &["store", "restore", &file]);
    assert!(code == 0 && said.contains("restored (revision 4"), "{said}");
    assert_eq!(lbctl(&one, &["config", "export"]), export);
    // Into an empty store: all revisions.
    let (code, said) = lbctl(&two, &["store", "restore", &file]);
    assert!(code == 0 && said.contains("2 revisions, up to 2"), "{said}");
    assert_eq!(lbctl(&two, &["config", "export"]), export);
    let (_, said) = lbctl(&two, &["history"]);
    assert!(said.contains("backend web/w1") || said.contains("add backend"), "{said}");
    // A truncated backup.
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 7]).unwrap();
    let (code, said) = lbctl(&two, &["store", "restore", &file]);
    assert!(code == 4 && said.contains("lb.backup is not a valid backup"), "{said}");
}

#[test]
fn a_file_with_its_revision_overwrites_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let socket = start(directory.path());
    let file = directory.path().join("services.toml").display().to_string();
    lbctl(&socket, &["service", "add", "web", "--vip", "10.0.0.1:80/tcp"]);
    let (code, text) = lbctl(&socket, &["config", "export", "--with-revision"]);
    assert!(code == 0 && text.starts_with("revision = 1\n"), "{text}");
    std::fs::write(&file, text.replace("port = 80", "port = 81")).unwrap();
    lbctl(&socket, &["backend", "add", "web", "w1", "10.1.0.1"]);
    let (code, said) = lbctl(&socket, &["config", "apply", &file]);
    assert!(code == 4 && said.contains("at revision 2 by now, not 1"), "{said}");
    assert_eq!(lbctl(&socket, &["config", "check", &file]).0, 0);
}

/// Without seats too: the state keeps those that it has.
#[test]
fn an_export_applied_to_its_own_state_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let socket = start(directory.path());
    let file = directory.path().join("services.toml").display().to_string();
    let run = |arguments: &[&str]| assert_eq!(lbctl(&socket, arguments).0, 0, "{arguments:?}");
    run(&["service", "add", "web", "--vip", "10.0.0.1:80/tcp"]);
    for name in ["a", "b", "c", "d"] {
        run(&["backend", "add", "web", name, &format!("10.1.0.{}", name.as_bytes()[0])]);
    }
    run(&["backend", "rm", "web", "b"]);
    run(&["backend", "add", "web", "e", "10.1.0.5"]);
    run(&["backend", "set", "web", "c", "--weight", "7"]);
    let full = lbctl(&socket, &["config", "export", "--full"]).1;
    assert!(full.contains("seat = ") && full.contains("seating = "), "{full}");
    for flags in [&[][..], &["--full"]] {
        let (code, text) = lbctl(&socket, &[&["config", "export"], flags].concat());
        assert!(code == 0 && text.starts_with("# Exported by lbctl"), "{text}");
        assert_eq!(text.contains("seat"), !flags.is_empty(), "{text}");
        std::fs::write(&file, text).unwrap();
        assert_eq!(lbctl(&socket, &["config", "diff", &file]), (0, String::new()));
    }
    assert_eq!(lbctl(&socket, &["config", "export", "--full"]).1, full);
}

#[test]
fn what_was_migrated_takes_no_changes() {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    std::fs::create_dir_all(&from).unwrap();
    let socket = start(&from);
    lbctl(&socket, &["service", "add", "web", "--vip", "10.0.0.1:80/tcp"]);
    let url = format!("file://{}", to.display());
    let (code, said) = lbctl(&socket, &["store", "migrate", "--to", &url]);
    assert!(code == 0 && said.contains("restart each lbd with --store"), "{said}");
    let (code, said) = lbctl(&socket, &["service", "rm", "web"]);
    assert!(code == 4 && said.contains(&format!("migrated to {url}")), "{said}");
    let store = RedbStore::open(&to, 100).unwrap();
    assert_eq!((store.head().revision.number, store.head().desired.services.len()), (1, 1));
}

#[test]
fn a_command_runs_under_the_lock() {
    let directory = tempfile::tempdir().unwrap();
    let socket = start(directory.path());
    let program = env!("CARGO_BIN_EXE_lbctl");
    let under = ["rollout", "lock", "--reason", "upgrade", "--", program, "rollout", "status", "rollout"];
    let (code, said) = lbctl(&socket, &under);
    assert!(code == 1 && said.contains("upgrade"), "{said}");
    assert_eq!(lbctl(&socket, &["rollout", "status", "rollout"]).0, 0);
}

/// A closed standard error, as in `lbctl ... 2>&1 | head`, does not change the exit code.
#[test]
fn a_closed_stderr_is_no_failure() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(path("bad.toml"), "[[service]]\nname = \"a\"\n").unwrap();
    let missing = path("none.sock");
    for (program, arguments, code) in [
        (env!("CARGO_BIN_EXE_lbctl"), vec!["man".to_owned(), path("man")], 0),
        (env!("CARGO_BIN_EXE_lbctl"), vec!["config".to_owned(), "check".to_owned(), path("bad.toml")], 1),
        (env!("CARGO_BIN_EXE_lbctl"), vec!["--socket".to_owned(), missing, "status".to_owned()], 3),
        (env!("CARGO_BIN_EXE_lbd"), vec!["ingress".to_owned(), "--config".to_owned(), path("none.toml")], 2),
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = std::process::Command::new(program).args(&arguments).stderr(writer).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}");
    }
}
