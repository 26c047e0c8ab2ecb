//! `lbctl replica`.

use super::{Context, Exit, Failure};
use crate::{desired::model::Name, lbctl::render::replica, serve::api::types::Replicas};
use clap::{Args, Subcommand};

/// What to do with replicas.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List replicas: their own word, their load, and when they last reported
    #[command(visible_alias = "ls")]
    List {
        /// Only of this service
        service: Option<Name>,
    },
    /// Print them again with each change
    Watch(Watch),
}

/// `replica watch`.
#[derive(Debug, Args)]
pub struct Watch {
    /// Only of this service
    service: Option<Name>,
    /// End after so many prints
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

async fn ask(context: &Context<'_>, service: Option<&Name>, after: Option<u64>) -> Result<Replicas, Failure> {
    let mut query: Vec<(&str, String)> = service.map(|s| ("service", s.to_string())).into_iter().collect();
    query.extend(after.map(|version| ("after", version.to_string())));
    Ok(context.client.get("/v1/replicas", &query).await?)
}

/// Runs one.
pub async fn run(context: &mut Context<'_>, command: Command) -> Result<Exit, Failure> {
    match command {
        Command::List { service } => {
            let list = ask(context, service.as_ref(), None).await?;
            if context.out.json {
                context.out.json(&list, false)?;
            } else if list.replicas.is_empty() {
                say!("no replica state is asked for: `lbctl service set SERVICE --replica stream` does");
            } else {
                replica::list(&mut context.out, &list)?;
            }
            Ok(Exit::Ok)
        }
        Command::Watch(Watch { service, count }) => {
            let (mut after, mut printed) = (None, 0);
            loop {
                let list = tokio::select! {
                    list = ask(context, service.as_ref(), after) => list?,
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
                        // Home, and clear: a terminal, since only those have colour.
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
