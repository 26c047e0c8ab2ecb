//! `lbctl history` and `lbctl rollback`.

use super::{Context, Exit, Failure, WriteFlags};
use crate::{lbctl::render::observe, serve::api::types};
use clap::Args;
use reqwest::Method;

/// Arguments of `lbctl history`.
#[derive(Debug, Args)]
pub struct HistoryArgs {
    /// Maximum number of revisions to list
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: usize,
    /// List only revisions before this one
    #[arg(long, value_name = "REVISION")]
    before: Option<u64>,
}

/// Arguments of `lbctl rollback`.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// Revision whose state is restored
    revision: u64,
    #[command(flatten)]
    write: WriteFlags,
}

/// Lists revisions.
pub async fn history(context: &mut Context<'_>, history: HistoryArgs) -> Result<Exit, Failure> {
    let mut query = vec![("limit", history.limit as u64)];
    query.extend(history.before.map(|b| ("before", b)));
    let list: types::History = context.client.get("/v1/history", &query).await?;
    if context.out.json {
        context.out.json(&list, false)?;
    } else if list.revisions.is_empty() {
        say!("no revisions: nothing has been configured yet");
    } else {
        observe::history(&mut context.out, &list.revisions)?;
    }
    Ok(Exit::Ok)
}

/// Restores the state of an earlier revision.
pub async fn rollback(context: &mut Context<'_>, rollback: RollbackArgs) -> Result<Exit, Failure> {
    let body = types::Rollback { revision: rollback.revision };
    let what = format!("rolled back to revision {}", rollback.revision);
    context.write(&what, Method::POST, "/v1/rollback", &rollback.write.query(), Some(&body)).await
}
