//! Completion of the command line: commands and flags from the definition of the CLI, names of services and backends
//! from lbd.
//!
//! The shell's script, which `lbctl completions` prints, runs `lbctl` with the words so far and [`VARIABLE`] set. An lbd
//! that does not answer at once completes nothing: the shell waits meanwhile.

use crate::{
    lbctl::client::ApiClient,
    serve::api::types::{BackendInfo, ServiceInfo},
};
use clap::Arg;
use clap_complete::{
    CompleteEnv, Shell,
    engine::{ArgValueCompleter, CompletionCandidate},
    env::Shells,
};
use serde::de::DeserializeOwned;
use std::{ffi::OsStr, io, path::PathBuf, time::Duration};

/// Environment variable by which a shell asks for completions.
const VARIABLE: &str = "LBCTL_COMPLETE";
/// Time that a shell waits for lbd.
const TIMEOUT: Duration = Duration::from_millis(500);

/// If a shell asks for completions, prints them and ends the process.
pub(super) fn answer() {
    CompleteEnv::with_factory(command).var(VARIABLE).complete();
}

/// Writes the script that a shell loads.
pub(super) fn script(shell: Shell, out: &mut dyn io::Write) -> io::Result<()> {
    let name = shell.to_string();
    let shells = Shells::builtins();
    let completer = shells.completer(&name).ok_or_else(|| io::Error::other(format!("no {name}")))?;
    completer.write_registration(VARIABLE, "lbctl", "lbctl", "lbctl", out)
}

/// The CLI's definition, with completers for names.
fn command() -> clap::Command {
    with_names(super::command(), false)
}

fn with_names(command: clap::Command, is_backend: bool) -> clap::Command {
    // The positional NAME is a backend in `lbctl backend`, and a service in `lbctl service`.
    let is_service = command.get_name() == "service";
    let complete = move |arg: Arg| match arg.get_id().as_str() {
        "service" => arg.add(ArgValueCompleter::new(services)),
        "backend" => arg.add(ArgValueCompleter::new(backends)),
        "name" if is_backend => arg.add(ArgValueCompleter::new(backends)),
        _ => arg,
    };
    command.mut_args(complete).mut_subcommands(move |inner| {
        let inner_is_backend = is_backend || inner.get_name() == "backend";
        let inner = with_names(inner, inner_is_backend);
        if is_service && inner.get_name() != "add" {
            inner.mut_args(|arg| match arg.get_id().as_str() {
                "name" => arg.add(ArgValueCompleter::new(services)),
                _ => arg,
            })
        } else {
            inner
        }
    })
}

/// Socket of lbd: that of the command line so far, of the environment, or the usual one.
fn socket() -> PathBuf {
    let words: Vec<_> = std::env::args_os().collect();
    let after = words.iter().position(|word| word == "--socket").and_then(|at| words.get(at + 1));
    let given = after.cloned().or_else(|| std::env::var_os("LBD_SOCKET"));
    given.map_or_else(|| PathBuf::from(crate::DEFAULT_SOCKET), PathBuf::from)
}

/// Asks lbd; none if it does not answer in time.
fn ask<T: DeserializeOwned>(path: &str) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().ok()?;
    let client = ApiClient::new(&socket()).ok()?;
    runtime.block_on(async { tokio::time::timeout(TIMEOUT, client.get(path, &())).await.ok()?.ok() })
}

fn candidates(names: impl Iterator<Item = String>, current: &OsStr) -> Vec<CompletionCandidate> {
    let current = current.to_string_lossy().into_owned();
    names.filter(|name| name.starts_with(&current)).map(CompletionCandidate::new).collect()
}

fn services(current: &OsStr) -> Vec<CompletionCandidate> {
    let all: Vec<ServiceInfo> = ask("/v1/services").unwrap_or_default();
    candidates(all.into_iter().map(|service| service.name.to_string()), current)
}

/// Backends of the services that the command line names; of all, if it names none.
fn backends(current: &OsStr) -> Vec<CompletionCandidate> {
    let all: Vec<BackendInfo> = ask("/v1/backends").unwrap_or_default();
    let words: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let is_named = |b: &BackendInfo| words.iter().any(|word| word == b.service.as_str());
    let any = all.iter().any(is_named);
    let mut names: Vec<String> =
        all.iter().filter(|b| !any || is_named(b)).map(|b| b.name.to_string()).collect();
    names.sort_unstable();
    names.dedup();
    candidates(names.into_iter(), current)
}
