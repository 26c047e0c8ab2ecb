//! `lbctl`: one definition feeds parser, help, completions and man pages.
//!
//! Input: arguments and environment. Output: data on standard output, talk on standard error, and an exit
//! code: [`Exit`]. A file per noun. Called by the binary.
#![deny(clippy::print_stderr, reason = "eprintln! panics where nobody reads standard error: use say!")]

/// Writes a line for people on standard error.
macro_rules! say {
    ($($arg:tt)*) => { $crate::lbctl::commands::write_stderr(&format!("{}\n", format_args!($($arg)*))) };
}

mod backend;
mod config;
mod doctor;
mod generate;
mod guard;
mod history;
mod host;
mod observe;
mod region;
mod replica;
mod rollout;
mod service;
mod store;
mod words;

use crate::{
    lbctl::{
        client::{Client, ClientError},
        render::{self, Out, Tone},
    },
    serve::api::types::{Change, WriteQuery},
};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use reqwest::Method;
use serde::Serialize;
use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

/// Exit codes, as documented in the help.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Done; yes; healthy.
    Ok = 0,
    /// The answer is no, or unhealthy.
    No = 1,
    /// The command line is wrong (clap's code too).
    Usage = 2,
    /// No lbd there.
    Unreachable = 3,
    /// lbd, or a check before asking it, refused.
    Refused = 4,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done; the answer is yes; all is healthy
  1  the answer is no: unhealthy, not forwarded, the file has mistakes, or states differ
  2  the command line is wrong
  3  lbd cannot be reached
  4  refused: the request breaks a rule, does not fit, or may not be made";

/// Manage an XDP load balancer: its services, their backends, and where flows go
#[derive(Debug, Parser)]
#[command(name = "lbctl", version, after_help = EXIT_CODES, max_term_width = 100, disable_help_subcommand = true)]
pub struct Cli {
    /// Unix socket of lbd
    #[arg(long, global = true, value_name = "PATH", env = "LBD_SOCKET", hide_env_values = true, default_value = crate::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// How to print
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    output: Output,
    #[command(subcommand)]
    noun: Noun,
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs
    Json,
}

#[derive(Debug, Subcommand)]
enum Noun {
    /// Services: what clients connect to
    #[command(subcommand, visible_alias = "services")]
    Service(Box<service::Command>),
    /// Backends: where a service's flows go
    #[command(subcommand, visible_alias = "backends")]
    Backend(backend::Command),
    /// Replicas: what the process behind each backend says of itself, and how loaded it is
    #[command(subcommand, visible_alias = "replicas")]
    Replica(replica::Command),
    /// Whether all is as it should be, and what is not (exit code 1)
    Status,
    /// Look at this host and the way to each worker: what is wrong, what mends it, and the MSS that fits
    Doctor(doctor::Doctor),
    /// Counters of backends and of the dataplane
    Stats(observe::Stats),
    /// Tracked flows: those that a stateless lookup would misplace, and UDP
    Flows(observe::Flows),
    /// Where a packet goes, and each step of why
    Explain(observe::Explain),
    /// Deny and allow lists of clients
    #[command(subcommand)]
    Guard(guard::Command),
    /// The desired state as one TOML file
    #[command(subcommand)]
    Config(config::Command),
    /// Revisions of the desired state, newest first
    History(history::History),
    /// Make the state of an older revision the newest
    Rollback(history::Rollback),
    /// Where the desired state is kept: how it is, backups, moving it elsewhere
    #[command(subcommand)]
    Store(store::Command),
    /// This host among the others: the VIPs that it announces, and taking it out of service
    #[command(subcommand)]
    Host(host::Command),
    /// Regions: where backends are, how far away, and whether they take flows
    #[command(subcommand, visible_alias = "regions")]
    Region(region::Command),
    /// How a service is spread over regions and versions, and why
    #[command(subcommand)]
    Policy(region::Policy),
    /// What is against the rules
    #[command(subcommand)]
    Audit(region::Audit),
    /// New versions of models, a share at a time; and the lock that lets one roll-out at a time touch the regions
    #[command(subcommand)]
    Rollout(rollout::Command),
    /// Print a completion script for a shell
    Completions(generate::Completions),
    /// Write man pages into a directory
    Man(generate::Man),
}

/// Flags of every command that changes something.
#[derive(Debug, Default, Args)]
struct WriteFlags {
    /// Only print what would change
    #[arg(long)]
    dry_run: bool,
    /// What the change is for, shown in the history
    #[arg(short, long, value_name = "TEXT")]
    message: Option<String>,
    /// Refuse if the newest revision is another
    #[arg(long, value_name = "REVISION")]
    if_revision: Option<u64>,
}

impl WriteFlags {
    fn query(&self) -> WriteQuery {
        WriteQuery { dry_run: self.dry_run, expected: self.if_revision, message: self.message.clone() }
    }
}

/// Why a command did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Refused before lbd was asked.
    #[error("{what}")]
    Refused { what: String, fix: Option<String>, details: Vec<String> },
    /// The command line is wrong in a way that clap cannot see.
    #[error("{what}")]
    Usage { what: String },
    /// Writing the output failed.
    #[error("cannot write: {0}")]
    Output(#[from] io::Error),
    /// This program cannot do what it should.
    #[error("{0}")]
    Broken(String),
}

/// What every command gets.
struct Context<'a> {
    client: Client,
    out: Out<'a>,
}

impl Context<'_> {
    /// Asks for a change and says what it did.
    async fn write(
        &mut self,
        what: &str,
        method: Method,
        path: &str,
        query: &WriteQuery,
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
        }
        Ok(Exit::Ok)
    }
}

/// Parses the arguments, runs the command, and gives the exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut stdout = io::BufWriter::new(io::stdout().lock());
    let colour = render::wants_colour(&io::stdout());
    let exit = run(cli, &mut stdout, colour).and_then(|exit| Ok(stdout.flush().map(|()| exit)?));
    let code = match exit {
        Ok(exit) => exit as u8,
        // Whoever read our output has seen enough.
        Err(Failure::Output(e)) if e.kind() == io::ErrorKind::BrokenPipe => Exit::Ok as u8,
        Err(failure) => report(&failure) as u8,
    };
    // What is left in the buffer has no reader, or was flushed.
    std::mem::forget(stdout);
    ExitCode::from(code)
}

/// Prints an error with its fix, and gives its exit code.
fn report(failure: &Failure) -> Exit {
    let colour = render::wants_colour(&io::stderr());
    let mut sink = io::sink();
    let out = Out::new(&mut sink, colour, false);
    let mut text = format!("{} {failure}\n", out.paint(Tone::Bad, "error:"));
    let (exit, fix, details) = match failure {
        Failure::Client(ClientError::Unreachable { fix, .. }) => {
            (Exit::Unreachable, Some((*fix).to_owned()), &[][..])
        }
        Failure::Client(ClientError::Refused { info }) => {
            (Exit::Refused, info.fix.clone(), &info.details[..])
        }
        Failure::Client(ClientError::Odd { .. }) => (Exit::Unreachable, None, &[][..]),
        Failure::Refused { fix, details, .. } => (Exit::Refused, fix.clone(), &details[..]),
        Failure::Usage { .. } => (Exit::Usage, None, &[][..]),
        Failure::Output(_) | Failure::Broken(_) => (Exit::No, None, &[][..]),
    };
    for detail in details {
        text.push_str(&format!("  {detail}\n"));
    }
    if let Some(fix) = fix {
        text.push_str(&format!("  {} {fix}\n", out.paint(Tone::Strong, "fix:")));
    }
    write_stderr(&text);
    exit
}

/// Writes to standard error. Whoever read it may be gone; what was asked for is done all the same.
fn write_stderr(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

fn run(cli: Cli, writer: &mut dyn Write, colour: bool) -> Result<Exit, Failure> {
    let mut out = Out::new(writer, colour, cli.output == Output::Json);
    // These need neither lbd nor a runtime.
    match &cli.noun {
        Noun::Config(config::Command::Check(check)) => return config::check(&mut out, check),
        Noun::Completions(completions) => return generate::completions(&mut out, completions),
        Noun::Man(man) => return generate::man(man),
        _ => {}
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| Failure::Broken(format!("cannot start: {e}")))?;
    let client = Client::new(&cli.socket).map_err(|e| Failure::Broken(format!("cannot set up HTTP: {e}")))?;
    let mut context = Context { client, out };
    runtime.block_on(async {
        match cli.noun {
            Noun::Service(command) => service::run(&mut context, *command).await,
            Noun::Backend(command) => backend::run(&mut context, command).await,
            Noun::Replica(command) => replica::run(&mut context, command).await,
            Noun::Region(command) => region::run(&mut context, command).await,
            Noun::Policy(command) => region::policy(&mut context, command).await,
            Noun::Audit(command) => region::audit(&mut context, command).await,
            Noun::Status => observe::status(&mut context).await,
            Noun::Doctor(doctor) => doctor::run(&mut context, doctor).await,
            Noun::Stats(stats) => observe::stats(&mut context, stats).await,
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
    Cli::command()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_definition_is_sound() {
        super::command().debug_assert();
    }
}
