//! `lbctl config`.

use super::{Context, Exit, Failure, Force, WriteFlags, import::ImportArgs};
use crate::{
    desired::{
        config::{ConfigError, File, export, export_without_seats},
        model::Desired,
    },
    lbctl::render::{self, Out},
    serve::api::types::{Change, Config, WriteQuery},
};
use clap::{Args, Subcommand};
use reqwest::Method;
use std::path::PathBuf;

/// Subcommands of `lbctl config`.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Check a file for mistakes, without contacting lbd (exit code 1 if it has any)
    Check(CheckArgs),
    /// Show what applying a file would change (exit code 1 if anything would)
    Diff {
        /// File, or - for standard input
        file: PathBuf,
    },
    /// Replace the desired state with the services of a file, atomically and as one revision
    Apply {
        /// File, or - for standard input
        file: PathBuf,
        #[command(flatten)]
        force: Force,
        #[command(flatten)]
        write: WriteFlags,
    },
    /// Print the desired state as a file for `config apply`; comments of an earlier file are not kept
    Export {
        /// Include the revision, so that `config apply` refuses the file if the state has changed since
        #[arg(long)]
        with_revision: bool,
        /// Include seat and seating, lbd's record of table positions: a host without a shared store then gets equal tables
        #[arg(long)]
        full: bool,
    },
    /// Convert a configuration of ipvsadm, keepalived, HAProxy or Katran, without contacting lbd
    ///
    /// Prints a file for `config apply` on standard output. What could not be kept is listed on standard error and at the top
    /// of the file, each with its line, the reason and what to use instead. With `-o json`, `config` is the file and `notes`
    /// the list.
    #[command(after_help = IMPORT_HELP)]
    Import(ImportArgs),
}

/// First line of an export.
const EXPORTED: &[u8] = b"# Exported by lbctl, sorted by name. Comments, [lbd] and [[hook]] are not kept.\n";

const IMPORT_HELP: &str = "\
Examples:
  ipvsadm -S -n | lbctl config import ipvsadm - > services.toml
  lbctl config import keepalived /etc/keepalived/keepalived.conf > services.toml
  lbctl config import haproxy haproxy.cfg --vip 192.0.2.10 --mode gue > services.toml
  lbctl config apply services.toml --dry-run

Exit codes:
  0  everything was kept
  1  something could not be kept: the result is valid, and its notes say what is missing
  2  the file cannot be parsed, or the command line is invalid";

/// Arguments of `config check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// File, or - for standard input
    file: PathBuf,
}

/// Checks a file, without contacting lbd.
pub fn check(out: &mut Out<'_>, check: &CheckArgs) -> Result<Exit, Failure> {
    let problems = match File::read(&check.file) {
        Err(error @ ConfigError::Read { .. }) => {
            return Err(refused(&error));
        }
        Err(ConfigError::Problems { file, problems }) => Some((file, problems)),
        Ok(file) => {
            match file.options.clone().resolve() {
                Ok(_) => {
                    let desired = file.desired.unwrap_or_default();
                    let backends: usize = desired.services.values().map(|s| s.backends.len()).sum();
                    let services = desired.services.len();
                    if out.json {
                        out.json(&serde_json::json!({ "problems": [], "services": services, "backends": backends }), false)?;
                    } else {
                        out.line(format!(
                            "{}: ok ({services} services, {backends} backends)",
                            check.file.display()
                        ))?;
                    }
                    None
                }
                Err(error) => {
                    let what = format!("[lbd] {error}");
                    Some((
                        check.file.display().to_string(),
                        vec![crate::desired::config::ConfigProblem { at: None, what }],
                    ))
                }
            }
        }
    };
    let Some((file, problems)) = problems else { return Ok(Exit::Ok) };
    if out.json {
        let list: Vec<_> = problems
            .iter()
            .map(|p| serde_json::json!({ "line": p.at.map(|a| a.0), "column": p.at.map(|a| a.1), "what": p.what }))
            .collect();
        out.json(&serde_json::json!({ "problems": list }), false)?;
    } else {
        let count = problems.len();
        out.line(ConfigError::Problems { file, problems }.to_string())?;
        say!("{count} {}", if count == 1 { "mistake" } else { "mistakes" });
    }
    Ok(Exit::No)
}

fn refused(error: &ConfigError) -> Failure {
    let text = error.to_string();
    match error {
        ConfigError::Read { .. } => Failure::Refused { what: text, fix: None, details: Vec::new() },
        ConfigError::Problems { file, .. } => Failure::Refused {
            what: format!("{file} has mistakes; nothing was changed"),
            fix: Some("correct them, then run `lbctl config check` again".to_owned()),
            details: text.lines().map(str::to_owned).collect(),
        },
    }
}

/// Reads the services of a file, and the revision that they are based on if the file names one.
fn desired(file: &std::path::Path) -> Result<(Desired, Option<u64>), Failure> {
    let read = File::read(file).map_err(|e| refused(&e))?;
    let desired = read.desired.ok_or_else(|| Failure::Refused {
        what: format!("{} has no [[service]]", file.display()),
        fix: Some("to remove all services, write `service = []`".to_owned()),
        details: Vec::new(),
    })?;
    Ok((desired, read.revision))
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: ConfigCommand) -> Result<Exit, Failure> {
    match command {
        ConfigCommand::Check(args) => check(&mut context.out, &args),
        ConfigCommand::Import(args) => super::import::run(&mut context.out, &args),
        ConfigCommand::Diff { file } => {
            // The dry run of `config apply`, so that both report the same differences.
            let (desired, revision) = desired(&file)?;
            let body = Config { revision, desired };
            let query = WriteQuery { dry_run: true, force: true, ..WriteQuery::default() };
            let change: Change = context.client.send(Method::PUT, "/v1/config", &query, Some(&body)).await?;
            let found = change.differences;
            if context.out.json {
                context.out.json(&found, false)?;
            } else {
                render::change::differences(&mut context.out, &found)?;
            }
            Ok(if found.is_empty() { Exit::Ok } else { Exit::No })
        }
        ConfigCommand::Apply { file, force, write } => {
            let (desired, revision) = desired(&file)?;
            let body = Config { revision, desired };
            let mut query = write.query_with(force);
            query.message.get_or_insert_with(|| format!("config apply {}", file.display()));
            context.write("configuration applied", Method::PUT, "/v1/config", &query, Some(&body)).await
        }
        ConfigCommand::Export { with_revision, full } => {
            let mut config: Config = context.client.get("/v1/config", &()).await?;
            // An lbd of an earlier version leaves them out.
            config.desired.name_sizes();
            if context.out.json {
                context.out.json(&config, false)?;
            } else {
                if let Some(revision) = config.revision.filter(|_| with_revision) {
                    context.out.line(format!("revision = {revision}\n"))?;
                }
                context.out.raw(EXPORTED)?;
                let text = if full { export(&config.desired) } else { export_without_seats(&config.desired) };
                context.out.raw(text.as_bytes())?;
            }
            Ok(Exit::Ok)
        }
    }
}
