//! `lbctl replica`.

use super::{Context, Exit, Failure, lists::ListFlags};
use crate::{desired::model::Name, lbctl::render::replica, serve::api::types::Replicas};
use clap::{Args, Subcommand};

/// Subcommands of `lbctl replica`.
#[derive(Debug, Subcommand)]
pub enum ReplicaCommand {
    /// List replicas: the state they report, their load, and the age of their last report
    #[command(visible_alias = "ls")]
    List {
        /// List only replicas of this service
        service: Option<Name>,
        #[command(flatten)]
        list: ListFlags,
    },
    /// Print the list again after each change
    Watch(Watch),
}

/// Arguments of `lbctl replica watch`.
#[derive(Debug, Args)]
pub struct Watch {
    /// List only replicas of this service
    service: Option<Name>,
    /// Stop after this many prints
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// Fetches the replicas; with `after`, waits until lbd's version is newer than that.
async fn fetch(
    context: &Context<'_>,
    service: Option<&Name>,
    after: Option<u64>,
) -> Result<Replicas, Failure> {
    let mut query: Vec<(&str, String)> = service.map(|s| ("service", s.to_string())).into_iter().collect();
    query.extend(after.map(|version| ("after", version.to_string())));
    Ok(context.client.get("/v1/replicas", &query).await?)
}

/// Lists replicas.
async fn list(context: &mut Context<'_>, service: Option<&Name>) -> Result<Exit, Failure> {
    let list = fetch(context, service, None).await?;
    if context.out.json {
        context.out.json(&list, false)?;
    } else if list.replicas.is_empty() {
        say!(
            "no service reads replica state: set a source with `lbctl service set SERVICE --replica stream`"
        );
    } else {
        replica::list(&mut context.out, &list)?;
    }
    Ok(Exit::Ok)
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: ReplicaCommand) -> Result<Exit, Failure> {
    match command {
        ReplicaCommand::List { service, list: flags } => {
            context.list(&flags, async |context| list(context, service.as_ref()).await).await
        }
        ReplicaCommand::Watch(Watch { service, count }) => {
            let (mut after, mut printed) = (None, 0);
            loop {
                let list = tokio::select! {
                    list = fetch(context, service.as_ref(), after) => list?,
                    _ = tokio::signal::ctrl_c() => return Ok(Exit::Ok),
                };
                if after == Some(list.version) {
                    continue;
                }
                after = Some(list.version);
                if context.out.json {
                    context.out.json(&list, true)?;
                } else {
                    if context.out.colour {
                        // Cursor home, clear screen: colour is only on where the output is a terminal.
                        context.out.raw(b"\x1b[H\x1b[2J")?;
                    }
                    replica::list(&mut context.out, &list)?;
                }
                context.out.flush()?;
                printed += 1;
                if count.is_some_and(|count| printed >= count) {
                    return Ok(Exit::Ok);
                }
            }
        }
    }
}
