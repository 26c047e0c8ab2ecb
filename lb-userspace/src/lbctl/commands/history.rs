//! `lbctl history` and `lbctl rollback`.

use super::{Context, Exit, Failure, WriteFlags};
use crate::{
    desired::model::Name,
    lbctl::render::{change, observe},
    serve::api::types,
};
use clap::{Args, Subcommand};
use reqwest::Method;

/// Arguments of `lbctl history`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct HistoryArgs {
    #[command(subcommand)]
    command: Option<HistoryCommand>,
    /// List only revisions that added, changed or removed this service
    #[arg(long, value_name = "SERVICE")]
    service: Option<Name>,
    /// Maximum number of revisions to list
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: usize,
    /// List only revisions before this one
    #[arg(long, value_name = "REVISION")]
    before: Option<u64>,
}

/// Subcommands of `lbctl history`.
#[derive(Debug, Subcommand)]
enum HistoryCommand {
    /// Show one revision: author, time, message, and the change in full
    Show {
        /// Revision
        revision: u64,
    },
    /// Show the differences between two revisions (exit code 1 if there are any)
    Diff {
        /// Revision to compare
        from: u64,
        /// Revision to compare it with
        to: u64,
    },
}

/// Arguments of `lbctl rollback`.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// Revision whose state is restored
    revision: u64,
    #[command(flatten)]
    write: WriteFlags,
}

/// Lists revisions, or shows or compares some.
pub async fn history(context: &mut Context<'_>, history: HistoryArgs) -> Result<Exit, Failure> {
    match &history.command {
        None => list(context, &history).await,
        Some(HistoryCommand::Show { revision }) => show(context, *revision).await,
        Some(HistoryCommand::Diff { from, to }) => diff(context, *from, *to).await,
    }
}

/// Lists revisions.
async fn list(context: &mut Context<'_>, history: &HistoryArgs) -> Result<Exit, Failure> {
    let mut found = types::History { revisions: Vec::new(), next: history.before };
    // lbd searches for a service's revisions piece by piece.
    loop {
        let mut query = vec![("limit", (history.limit - found.revisions.len()).to_string())];
        query.extend(found.next.map(|before| ("before", before.to_string())));
        query.extend(history.service.as_ref().map(|service| ("service", service.to_string())));
        let page: types::History = context.client.get("/v1/history", &query).await?;
        found.revisions.extend(page.revisions);
        found.next = page.next;
        if found.next.is_none() || found.revisions.len() >= history.limit {
            break;
        }
    }
    if context.out.json {
        context.out.json(&found, false)?;
    } else if !found.revisions.is_empty() {
        observe::history(&mut context.out, &found.revisions)?;
    } else if let Some(service) = &history.service {
        say!("no kept revision has changed a service {service}");
    } else {
        say!("no revisions: nothing has been configured yet");
    }
    Ok(Exit::Ok)
}

/// Shows one revision.
async fn show(context: &mut Context<'_>, revision: u64) -> Result<Exit, Failure> {
    let found: types::RevisionChange = context.client.get(&format!("/v1/history/{revision}"), &()).await?;
    if context.out.json {
        context.out.json(&found, false)?;
        return Ok(Exit::Ok);
    }
    observe::revision(&mut context.out, &found.revision)?;
    context.out.line("")?;
    match &found.differences {
        Some(differences) => change::differences(&mut context.out, differences)?,
        None => {
            let before = revision.saturating_sub(1);
            context.out.line(format!("what changed is unknown: revision {before} is no longer available"))?;
        }
    }
    Ok(Exit::Ok)
}

/// Compares two revisions.
async fn diff(context: &mut Context<'_>, from: u64, to: u64) -> Result<Exit, Failure> {
    let found: types::RevisionDiff =
        context.client.get(&format!("/v1/history/{from}/diff/{to}"), &()).await?;
    if context.out.json {
        context.out.json(&found, false)?;
    } else {
        change::differences(&mut context.out, &found.differences)?;
    }
    Ok(if found.differences.is_empty() { Exit::Ok } else { Exit::No })
}

/// Restores the state of an earlier revision.
pub async fn rollback(context: &mut Context<'_>, rollback: RollbackArgs) -> Result<Exit, Failure> {
    let body = types::Rollback { revision: rollback.revision };
    let what = format!("rolled back to revision {}", rollback.revision);
    context.write(&what, Method::POST, "/v1/rollback", &rollback.write.query(), Some(&body)).await
}
