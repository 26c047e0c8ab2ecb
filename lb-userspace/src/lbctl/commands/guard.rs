//! `lbctl guard`: deny and allow lists.

use super::{Context, Exit, Failure, WriteFlags};
use crate::{
    desired::model::{ListName, guard::parse},
    lbctl::render::{guard as render, units::parse_duration},
    serve::api::guard::{Entries, GuardDecision, GuardInfo, ListChange},
};
use clap::{Args, Subcommand};
use ipnet::IpNet;
use reqwest::Method;
use serde_json::json;
use std::{collections::BTreeSet, io::Read, net::IpAddr, path::PathBuf, time::Duration};

/// Largest number of invalid lines of a file that an error lists.
const LISTED_LINES: usize = 20;

/// Subcommands of `lbctl guard`.
#[derive(Debug, Subcommand)]
pub enum GuardCommand {
    /// Show the number of entries, and how many packets they have dropped
    Show,
    /// Manage the deny list: sources whose packets to services are dropped
    #[command(subcommand)]
    Deny(Verb),
    /// Manage the allow list: exceptions; the longest matching prefix decides, and allow wins a tie
    #[command(subcommand)]
    Allow(Verb),
    /// Show which entry decides about an address (exit code 1 if it is denied)
    Check {
        /// Source address
        address: IpAddr,
    },
}

/// Subcommands of `lbctl guard deny` and `lbctl guard allow`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Add entries to the list
    Add(AddEntriesArgs),
    /// Remove entries, written as they were added
    Rm(Rm),
    /// List entries
    List(ListArgs),
    /// Replace the list with the entries of a file: one address or prefix per line, comments after #
    Load(LoadArgs),
    /// Remove all entries
    Flush {
        #[command(flatten)]
        write: WriteFlags,
    },
}

/// Arguments of `lbctl guard LIST add`.
#[derive(Debug, Args)]
pub struct AddEntriesArgs {
    /// Addresses or prefixes
    #[arg(required = true, value_name = "PREFIX", value_parser = parse)]
    prefixes: Vec<IpNet>,
    /// Time after which the entries expire [default: never]
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    time: Option<Duration>,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `lbctl guard LIST rm`.
#[derive(Debug, Args)]
pub struct Rm {
    /// Addresses or prefixes
    #[arg(required = true, value_name = "PREFIX", value_parser = parse)]
    prefixes: Vec<IpNet>,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `lbctl guard LIST list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// List only entries that lie within this prefix or contain it
    #[arg(long, value_name = "PREFIX", value_parser = parse)]
    within: Option<IpNet>,
    /// Maximum number of entries to list
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    limit: usize,
}

/// Arguments of `lbctl guard LIST load`.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// File, or - for standard input
    file: PathBuf,
    /// Keep the entries that are already on the list
    #[arg(long)]
    keep: bool,
    /// Time after which the entries expire [default: never]
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    time: Option<Duration>,
    #[command(flatten)]
    write: WriteFlags,
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: GuardCommand) -> Result<Exit, Failure> {
    match command {
        GuardCommand::Show => {
            let info: GuardInfo = context.client.get("/v1/guard", &()).await?;
            if context.out.json {
                context.out.json(&info, false)?;
            } else {
                render::show(&mut context.out, &info)?;
            }
            Ok(Exit::Ok)
        }
        GuardCommand::Check { address } => {
            let decision: GuardDecision =
                context.client.get("/v1/guard/check", &json!({ "address": address })).await?;
            if context.out.json {
                context.out.json(&decision, false)?;
            } else {
                render::decision(&mut context.out, &decision)?;
            }
            Ok(if decision.denied { Exit::No } else { Exit::Ok })
        }
        GuardCommand::Deny(list) => run_list(context, ListName::Deny, list).await,
        GuardCommand::Allow(list) => run_list(context, ListName::Allow, list).await,
    }
}

async fn run_list(context: &mut Context<'_>, name: ListName, list: Verb) -> Result<Exit, Failure> {
    let texts = |nets: &[IpNet]| nets.iter().map(ToString::to_string).collect::<Vec<_>>();
    let label = name.label();
    let (what, change, write) = match list {
        Verb::List(args) => return entries(context, name, args).await,
        Verb::Add(AddEntriesArgs { prefixes, time, write }) => {
            let change = ListChange { add: texts(&prefixes), for_s: seconds(time)?, ..ListChange::default() };
            (format!("{label} list: {} added", count(prefixes.len())), change, write)
        }
        Verb::Rm(Rm { prefixes, write }) => {
            let change = ListChange { remove: texts(&prefixes), ..ListChange::default() };
            (format!("{label} list: {} removed", count(prefixes.len())), change, write)
        }
        Verb::Load(LoadArgs { file, keep, time, write }) => {
            let nets = read(&file)?;
            let add: Vec<String> = nets.iter().map(ToString::to_string).collect();
            let change = ListChange { add, replace: !keep, for_s: seconds(time)?, ..ListChange::default() };
            (format!("{label} list: {} loaded", count(nets.len())), change, write)
        }
        Verb::Flush { write } => {
            (format!("{label} list: flushed"), ListChange { replace: true, ..ListChange::default() }, write)
        }
    };
    let path = format!("/v1/guard/{label}");
    context.write(&what, Method::POST, &path, &write.query(), Some(&change)).await
}

fn count(n: usize) -> String {
    if n == 1 { "1 entry".to_owned() } else { format!("{n} entries") }
}

fn seconds(time: Option<Duration>) -> Result<Option<u64>, Failure> {
    match time {
        Some(time) if time.as_secs() == 0 || time.subsec_nanos() != 0 => {
            Err(Failure::Usage { what: "--for takes whole seconds, at least 1s".to_owned() })
        }
        other => Ok(other.map(|time| time.as_secs())),
    }
}

async fn entries(context: &mut Context<'_>, name: ListName, args: ListArgs) -> Result<Exit, Failure> {
    let query = json!({ "limit": args.limit, "within": args.within });
    let path = format!("/v1/guard/{}", name.label());
    let found: Entries = context.client.get(&path, &query).await?;
    if context.out.json {
        context.out.json(&found, false)?;
        return Ok(Exit::Ok);
    }
    render::entries(&mut context.out, &found)?;
    let shown = found.entries.len();
    if shown == 0 {
        say!("no matching entry on the {} list", name.label());
    } else if shown < found.total && args.within.is_none() {
        say!("{shown} of {} entries shown: raise --limit, or narrow the list with --within", found.total);
    }
    Ok(Exit::Ok)
}

/// Reads the prefixes of a file. If a line is invalid, returns an error that lists the invalid lines.
fn read(file: &std::path::Path) -> Result<BTreeSet<IpNet>, Failure> {
    let name = file.display().to_string();
    let refuse = |what: String, fix: Option<&str>, details| Failure::Refused {
        what,
        fix: fix.map(str::to_owned),
        details,
    };
    let text = if name == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    let text = text.map_err(|error| refuse(format!("cannot read {name}: {error}"), None, Vec::new()))?;
    prefixes(&text).map_err(|(count, details)| {
        let lines = if count == 1 { "1 line is".to_owned() } else { format!("{count} lines are") };
        refuse(
            format!("{name}: {lines} invalid; nothing was changed"),
            Some("correct the lines, or begin them with # to skip them"),
            details,
        )
    })
}

/// Parses the prefixes of a text; on error, returns the number of invalid lines and messages about the first of them.
fn prefixes(text: &str) -> Result<BTreeSet<IpNet>, (usize, Vec<String>)> {
    let (mut nets, mut count, mut invalid) = (BTreeSet::new(), 0, Vec::new());
    for (i, line) in text.lines().enumerate() {
        // Published lists, such as Spamhaus DROP, begin comments with ; too.
        let entry = line.split(['#', ';']).next().unwrap_or_default().trim();
        if entry.is_empty() {
            continue;
        }
        match parse(entry) {
            Ok(net) => drop(nets.insert(net)),
            Err(what) => {
                count += 1;
                if invalid.len() < LISTED_LINES {
                    invalid.push(format!("line {}: {what}", i + 1));
                }
            }
        }
    }
    if count == 0 { Ok(nets) } else { Err((count, invalid)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_whole_or_not_at_all() {
        let good = "# drop\n192.0.2.0/24 ; SBL1\n\n  2001:db8::/32\n198.51.100.7\n198.51.100.7/32\n";
        let nets: Vec<String> = prefixes(good).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(nets, ["192.0.2.0/24", "198.51.100.7/32", "2001:db8::/32"]);
        let (count, wrong) = prefixes("192.0.2.1/24\nok\n10.0.0.0/8\n").unwrap_err();
        assert_eq!(count, 2);
        assert!(
            wrong[0].starts_with("line 1: ") && wrong[0].contains("give 192.0.2.0/24 or 192.0.2.1"),
            "{wrong:?}"
        );
        assert!(wrong[1].starts_with("line 2: \"ok\""), "{wrong:?}");
        let (count, wrong) = prefixes(&"x\n".repeat(1_000)).unwrap_err();
        assert_eq!((count, wrong.len()), (1_000, LISTED_LINES));
    }
}
