//! The `lbctl` binary, end to end over a real socket, store and API, with an engine that needs no kernel.
//!
//! Each file in `tests/cli/` runs against a daemon of its own. `TRYCMD=overwrite cargo test --test cli`
//! writes what was printed into the files; put `[..]` where it
//! differs from run to run.

#![allow(clippy::unwrap_used, reason = "a test file, helpers included")]

use lb_userspace::{
    api::{self, Control, memory::MemoryEngine},
    health::{Book, Checker, prober},
    store::{RedbStore, Store},
};
use std::{path::Path, sync::Arc};

/// Starts a daemon without a dataplane in a directory; it ends with the test's process.
fn start(directory: &Path) -> std::path::PathBuf {
    let socket = directory.join("lbd.sock");
    let (ready, started) = std::sync::mpsc::channel();
    let (state, path) = (directory.to_owned(), socket.clone());
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Arc::new(RedbStore::open(&state, 100).unwrap());
            let book = Arc::new(Book::default());
            let (verdicts, mut told) = tokio::sync::mpsc::channel(100);
            tokio::spawn(async move { while told.recv().await.is_some() {} });
            let checker = Checker::new(book.clone(), 10, prober(), verdicts);
            tokio::spawn(checker.run(store.watch(), store.clone()));
            let control = Control::new(store, Arc::new(MemoryEngine::new(5)), book);
            tokio::spawn(control.clone().follow());
            let (listener, writers) = api::bind(&path, 0o660, None).unwrap();
            ready.send(()).unwrap();
            api::serve(listener, control, writers, std::future::pending()).await.unwrap();
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
    cases.env("LBD_SOCKET", socket.display().to_string()).env("COLUMNS", "100").case(file);
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

/// A path into the binary under test, and its arguments, with no reader at the other end of the pipe.
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
        assert!(output.status.success() && script.contains("undrain"), "{shell}");
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
