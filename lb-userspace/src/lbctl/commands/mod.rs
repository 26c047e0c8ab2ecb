//! `lbctl`: one clap definition feeds the parser, the help, the completions and the man pages.
//!
//! Input: arguments and environment. Output: data on standard output, messages on standard error, and an exit
//! code ([`Exit`]). One file per noun. Called by the binary.
#![deny(clippy::print_stderr, reason = "eprintln! panics if standard error is closed: use say!")]

/// Writes a line for the user to standard error.
macro_rules! say {
    ($($arg:tt)*) => { $crate::lbctl::commands::write_stderr(&format!("{}\n", format_args!($($arg)*))) };
}

mod backend;
mod complete;
mod config;
mod doctor;
mod events;
mod generate;
mod guard;
mod history;
mod host;
mod import;
mod lists;
mod locked;
mod observe;
mod region;
mod replica;
mod rollout;
mod service;
mod store;
mod words;

use crate::{
    lbctl::{
        client::{ApiClient, ClientError},
        render::{self, Out, Tone},
    },
    printable::escape,
    serve::api::types::{Change, WriteQuery},
};
use clap::{
    Args, CommandFactory, Parser, Subcommand,
    builder::{PossibleValue, TypedValueParser},
};
use reqwest::Method;
use serde::Serialize;
use serde_json_path::JsonPath;
use std::{
    ffi::OsStr,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Exit codes, as documented in the help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Success; the answer is yes; healthy.
    Ok,
    /// The answer is no; unhealthy.
    No,
    /// The command line is invalid (clap uses the same code).
    Usage,
    /// lbd cannot be reached.
    Unreachable,
    /// lbd refused the request, or a check in lbctl did.
    Refused,
    /// The code of a command that lbctl has run.
    Of(u8),
}

impl Exit {
    fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::No => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::Refused => 4,
            Self::Of(code) => code,
        }
    }
}

const EXIT_CODES: &str = "\
Exit codes:
  0  success; the answer is yes; everything is healthy
  1  the answer is no: unhealthy, not forwarded, the file has mistakes, or states differ
  2  the command line is invalid
  3  lbd cannot be reached
  4  refused: the request breaks a rule, exceeds a limit, or is not permitted";

/// Manage a running XDP load balancer: services, their backends, and where flows go
#[derive(Debug, Parser)]
#[command(name = "lbctl", version, after_help = EXIT_CODES, max_term_width = 100, disable_help_subcommand = true)]
pub struct LbctlArgs {
    /// Path of lbd's Unix socket
    #[arg(long, global = true, value_name = "PATH", env = "LBD_SOCKET", hide_env_values = true, default_value = crate::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// Output format: table, json, or jsonpath=EXPR (RFC 9535), which prints parts of the JSON, one a line
    #[arg(short, long, global = true, value_name = "FORMAT", value_parser = OutputParser, default_value = "table")]
    output: OutputFormat,
    /// Show all columns and whole lines, even if they are wider than the terminal
    #[arg(long, global = true)]
    wide: bool,
    #[command(subcommand)]
    noun: Noun,
}

/// Output format.
#[derive(Clone, Debug)]
enum OutputFormat {
    /// Aligned columns, for people.
    Table,
    /// JSON, for programs.
    Json,
    /// What a JSONPath finds in the JSON.
    Path(Box<JsonPath>),
}

/// Parses an [`OutputFormat`].
#[derive(Clone)]
struct OutputParser;

impl TypedValueParser for OutputParser {
    type Value = OutputFormat;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &OsStr,
    ) -> Result<OutputFormat, clap::Error> {
        let refused = |what: String| {
            let arg = arg.map(ToString::to_string).unwrap_or_default();
            let what = format!("invalid value for '{arg}': {what}\n\nFor more information, try '--help'.\n");
            clap::Error::raw(clap::error::ErrorKind::ValueValidation, what).with_cmd(command)
        };
        match value.to_str() {
            Some("table") => Ok(OutputFormat::Table),
            Some("json") => Ok(OutputFormat::Json),
            Some(text) => match text.strip_prefix("jsonpath=") {
                Some(path) => json_path(path).map(|path| OutputFormat::Path(path.into())).map_err(refused),
                None => Err(refused(format!("{text:?} is not table, json or jsonpath=EXPR"))),
            },
            None => Err(refused("it is not UTF-8".to_owned())),
        }
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let values = ["table", "json", "jsonpath="];
        Some(Box::new(values.into_iter().map(PossibleValue::new)))
    }
}

/// Parses a JSONPath. `$` may be left out, and the braces of kubectl are understood.
fn json_path(text: &str) -> Result<JsonPath, String> {
    let inner = text.strip_prefix('{').and_then(|t| t.strip_suffix('}')).unwrap_or(text);
    let path = match inner.chars().next() {
        Some('$') => inner.to_owned(),
        Some('.' | '[') => format!("${inner}"),
        _ => format!("$.{inner}"),
    };
    JsonPath::parse(&path).map_err(|e| format!("jsonpath {text:?}: {e}"))
}

#[derive(Debug, Subcommand)]
enum Noun {
    /// Manage services: the virtual addresses that clients connect to
    #[command(subcommand, visible_alias = "services")]
    Service(Box<service::ServiceCommand>),
    /// Manage backends: the workers that serve a service
    #[command(subcommand, visible_alias = "backends")]
    Backend(backend::BackendCommand),
    /// Show replicas: the readiness and load that the process behind each backend reports
    #[command(subcommand, visible_alias = "replicas")]
    Replica(replica::ReplicaCommand),
    /// Show whether the load balancer is healthy, and each problem (exit code 1 if unhealthy)
    Status(lists::WatchFlags),
    /// Check this host and the path to each worker: problems, their fixes, and the MSS that fits
    Doctor(doctor::Doctor),
    /// Show counters of backends and of the dataplane
    Stats(observe::StatsArgs),
    /// Show services and backends with their rates, on a screen that is refreshed
    Top(observe::TopArgs),
    /// Show what happened on this host: verdicts, drains, roll-outs, problems, and more
    Events(events::EventsArgs),
    /// List tracked flows: UDP and NAT flows, and TCP flows that a stateless lookup would misplace
    Flows(observe::FlowsArgs),
    /// Explain where a packet goes, step by step
    Explain(observe::Explain),
    /// Manage the deny and allow lists of client addresses
    #[command(subcommand)]
    Guard(guard::GuardCommand),
    /// Check, compare, apply, export or import the desired state as one TOML file
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// List revisions of the desired state, newest first; show or compare them
    History(history::HistoryArgs),
    /// Restore the state of an earlier revision as a new revision
    Rollback(history::RollbackArgs),
    /// Manage the store of the desired state: status, backup, restore, migration
    #[command(subcommand)]
    Store(store::StoreCommand),
    /// Show the VIPs that this host announces, or take the host out of service
    #[command(subcommand)]
    Host(host::HostCommand),
    /// Manage regions: list their distance, health and ready backends; declare or drain them
    #[command(subcommand, visible_alias = "regions")]
    Region(region::RegionCommand),
    /// Explain how a service is spread over regions and versions
    #[command(subcommand)]
    Policy(region::Policy),
    /// Report what violates the rules
    #[command(subcommand)]
    Audit(region::Audit),
    /// Roll out new model versions gradually, and manage the lock that admits one rollout at a time
    #[command(subcommand)]
    Rollout(rollout::RolloutCommand),
    /// Print a completion script for a shell
    Completions(generate::Completions),
    /// Write man pages to a directory
    Man(generate::Man),
}

/// Flags of every command that changes something.
#[derive(Debug, Default, Args)]
struct WriteFlags {
    /// Print what would change, without changing it
    #[arg(long)]
    dry_run: bool,
    /// Reason for the change, shown in the history
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Refuse the change unless this is the newest revision
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
}

impl WriteFlags {
    fn query(&self) -> WriteQuery {
        let (dry_run, expected, message) = (self.dry_run, self.if_revision, self.message.clone());
        WriteQuery { dry_run, expected, message, force: false }
    }

    fn query_with(&self, force: Force) -> WriteQuery {
        WriteQuery { force: force.force, ..self.query() }
    }
}

/// Flag of commands that may set a VIP.
#[derive(Clone, Copy, Debug, Default, Args)]
struct Force {
    /// Allow a VIP that is an address of this host, whose own connections to it are then balanced
    #[arg(long)]
    force: bool,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Refused by lbctl itself, before it contacted lbd.
    #[error("{what}")]
    Refused { what: String, fix: Option<String>, details: Vec<String> },
    /// The command line is invalid in a way that clap cannot detect.
    #[error("{what}")]
    Usage { what: String },
    /// Writing the output failed.
    #[error("cannot write the output: {0}")]
    Output(io::Error),
    /// lbctl itself cannot work: no runtime, no HTTP client.
    #[error("{0}")]
    Internal(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // A table finds out only when it is printed that it has no such column.
        match error.get_ref().and_then(|inner| inner.downcast_ref::<render::order::NoColumn>()) {
            Some(no_column) => Self::Usage { what: no_column.to_string() },
            None => Self::Output(error),
        }
    }
}

/// What every command receives: the connection to lbd, and the output.
struct Context<'a> {
    client: ApiClient,
    out: Out<'a>,
}

impl Context<'_> {
    /// Sends a change to lbd and reports its result.
    async fn write(
        &mut self,
        what: &str,
        method: Method,
        path: &str,
        query: &impl Serialize,
        body: Option<&impl Serialize>,
    ) -> Result<Exit, Failure> {
        let change: Change = self.client.send(method, path, query, body).await?;
        if self.out.json {
            self.out.json(&change, false)?;
        } else {
            if change.dry_run {
                render::change::differences(&mut self.out, &change.differences)?;
            }
            say!("{}", render::change::summary(what, &change));
            for note in &change.notes {
                say!("  note: {}", escape(note));
            }
        }
        Ok(Exit::Ok)
    }
}

/// Parses the arguments, runs the command, and gives the exit code.
pub fn main() -> ExitCode {
    complete::answer();
    let cli = LbctlArgs::parse();
    let mut stdout = io::BufWriter::new(io::stdout().lock());
    let colour = render::wants_colour(&io::stdout());
    let exit = run(cli, &mut stdout, colour).and_then(|exit| Ok(stdout.flush().map(|()| exit)?));
    let code = match exit {
        Ok(exit) => exit.code(),
        // The reader closed the pipe because it has seen enough, as `head` does.
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => Exit::Ok.code(),
        Err(failure) => report(&failure).code(),
    };
    // The buffer was flushed, or its reader is gone; dropping it would try to write again.
    std::mem::forget(stdout);
    ExitCode::from(code)
}

/// Prints an error with its fix, and returns its exit code.
fn report(failure: &Failure) -> Exit {
    let colour = render::wants_colour(&io::stderr());
    let mut sink = io::sink();
    let out = Out::new(&mut sink, colour, false);
    // An error of lbd may contain texts of other users.
    let what = match failure {
        Failure::Client(error) => escape(&error.to_string()).into_owned(),
        other => other.to_string(),
    };
    let mut text = format!("{} {what}\n", out.paint(Tone::Bad, "error:"));
    let (exit, fix, details) = match failure {
        Failure::Client(ClientError::Unreachable { fix, .. }) => {
            (Exit::Unreachable, Some((*fix).to_owned()), &[][..])
        }
        Failure::Client(ClientError::Refused { info }) => {
            (Exit::Refused, info.fix.clone(), &info.details[..])
        }
        Failure::Client(ClientError::UnexpectedResponse { .. }) => (Exit::Unreachable, None, &[][..]),
        Failure::Refused { fix, details, .. } => (Exit::Refused, fix.clone(), &details[..]),
        Failure::Usage { .. } => (Exit::Usage, None, &[][..]),
        Failure::Output(_) | Failure::Internal(_) => (Exit::No, None, &[][..]),
    };
    for detail in details {
        text.push_str(&format!("  {}\n", escape(detail)));
    }
    if let Some(fix) = fix {
        text.push_str(&format!("  {} {fix}\n", out.paint(Tone::Strong, "fix:")));
    }
    write_stderr(&text);
    exit
}

/// Writes to standard error and ignores failures: the command's result does not depend on a reader.
fn write_stderr(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

fn run(cli: LbctlArgs, writer: &mut dyn Write, colour: bool) -> Result<Exit, Failure> {
    let width = render::terminal_width().filter(|_| !cli.wide);
    let (json, path) = match cli.output {
        OutputFormat::Table => (false, None),
        OutputFormat::Json => (true, None),
        OutputFormat::Path(path) => (true, Some(*path)),
    };
    let mut out = Out::new(writer, colour, json).with_width(width);
    out.path = path;
    // These commands need neither lbd nor a runtime.
    match &cli.noun {
        Noun::Config(config::ConfigCommand::Check(check)) => return config::check(&mut out, check),
        Noun::Config(config::ConfigCommand::Import(args)) => return import::run(&mut out, args),
        Noun::Completions(completions) => return generate::completions(&mut out, completions),
        Noun::Man(man) => return generate::man(man),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::Internal(format!("cannot start the async runtime: {e}")))?;
    let client = ApiClient::new(&cli.socket)
        .map_err(|e| Failure::Internal(format!("cannot set up the HTTP client: {e}")))?;
    let mut context = Context { client, out };
    runtime.block_on(async {
        match cli.noun {
            Noun::Service(command) => service::run(&mut context, *command).await,
            Noun::Backend(command) => backend::run(&mut context, command).await,
            Noun::Replica(command) => replica::run(&mut context, command).await,
            Noun::Region(command) => region::run(&mut context, command).await,
            Noun::Policy(command) => region::policy(&mut context, command).await,
            Noun::Audit(command) => region::audit(&mut context, command).await,
            Noun::Status(watch) => context.repeat(&watch, observe::status).await,
            Noun::Doctor(doctor) => doctor::run(&mut context, doctor).await,
            Noun::Stats(stats) => observe::stats(&mut context, stats).await,
            Noun::Top(top) => observe::top(&mut context, top).await,
            Noun::Events(events) => events::events(&mut context, events).await,
            Noun::Flows(flows) => observe::flows(&mut context, flows).await,
            Noun::Explain(explain) => observe::explain(&mut context, explain).await,
            Noun::Guard(command) => guard::run(&mut context, command).await,
            Noun::Config(command) => config::run(&mut context, command).await,
            Noun::History(history) => history::history(&mut context, history).await,
            Noun::Store(command) => store::run(&mut context, command).await,
            Noun::Host(command) => host::run(&mut context, command).await,
            Noun::Rollout(command) => rollout::run(&mut context, command).await,
            Noun::Rollback(rollback) => history::rollback(&mut context, rollback).await,
            Noun::Completions(_) | Noun::Man(_) => Ok(Exit::Ok),
        }
    })
}

/// The whole command, for completions and man pages.
pub fn command() -> clap::Command {
    LbctlArgs::command()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_json_path_may_be_written_as_for_kubectl() {
        for text in ["$[*].name", "[*].name", "{[*].name}", "{$[*].name}"] {
            assert_eq!(super::json_path(text).unwrap().to_string(), "$[*].name", "{text}");
        }
        assert!(super::json_path(".problems").is_ok() && super::json_path("problems").is_ok());
        assert!(super::json_path("$[").unwrap_err().starts_with("jsonpath \"$[\": "));
    }

    #[test]
    fn the_definition_is_sound() {
        super::command().debug_assert();
    }
}
