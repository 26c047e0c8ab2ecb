//! `lbctl events`.

use super::{Context, Exit, Failure};
use crate::{
    desired::model::Name,
    lbctl::{
        client::{ClientError, EventMessage},
        render,
    },
    serve::api::events::EventRecord,
};
use clap::Args;
use std::time::Duration;

/// Pause before a broken stream is opened again.
const RETRY: Duration = Duration::from_secs(1);

/// Arguments of `lbctl events`.
#[derive(Debug, Args)]
#[command(after_help = "Example: lbctl events --follow --kind backend --service chat")]
pub struct EventsArgs {
    /// Go on with what happens from now on, until interrupted; a restart of lbd is survived
    #[arg(short, long)]
    follow: bool,
    /// Show only events of this kind, or whose kind begins with these words (repeatable)
    #[arg(long, value_name = "KIND")]
    kind: Vec<String>,
    /// Show only events about this service
    #[arg(long, value_name = "SERVICE")]
    service: Option<Name>,
    /// Show only events after this one, given by its id
    #[arg(long, value_name = "ID")]
    after: Option<String>,
}

/// Shows events.
pub async fn events(context: &mut Context<'_>, events: EventsArgs) -> Result<Exit, Failure> {
    let mut after = events.after.clone();
    let mut has_answered = false;
    loop {
        let end = tokio::select! {
            end = read(context, &events, &mut after, &mut has_answered) => end,
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Ok),
        };
        match end {
            Ok(()) if !events.follow => return Ok(Exit::Ok),
            // lbd stops, or was restarted: whoever follows waits for it.
            Ok(()) | Err(Failure::Client(ClientError::Unreachable { .. }))
                if has_answered && events.follow => {}
            Err(failure) => return Err(failure),
            Ok(()) => return Ok(Exit::Ok),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY) => {}
            _ = tokio::signal::ctrl_c() => return Ok(Exit::Ok),
        }
    }
}

/// Prints one stream to its end.
async fn read(
    context: &mut Context<'_>,
    events: &EventsArgs,
    after: &mut Option<String>,
    has_answered: &mut bool,
) -> Result<(), Failure> {
    let mut query = vec![("follow", events.follow.to_string())];
    if !events.kind.is_empty() {
        query.push(("kind", events.kind.join(",")));
    }
    query.extend(events.service.as_ref().map(|service| ("service", service.to_string())));
    query.extend(after.clone().map(|after| ("after", after)));
    let mut stream = context.client.event_stream("/v1/events", &query).await?;
    *has_answered = true;
    while let Some(message) = stream.next().await? {
        let EventMessage { id, event, data } = message;
        if event == "gap" {
            let gap: serde_json::Value = serde_json::from_str(&data).unwrap_or_default();
            context.out.flush()?;
            say!("gap: {}", crate::printable::escape(gap["missed"].as_str().unwrap_or("events are missing")));
        } else {
            let record: EventRecord = serde_json::from_str(&data).map_err(|e| {
                Failure::Internal(format!("lbd sent an event that this lbctl cannot read: {e}"))
            })?;
            if context.out.json {
                context.out.json(&record, true)?;
            } else {
                render::observe::event(&mut context.out, &record)?;
            }
        }
        if events.follow {
            context.out.flush()?;
        }
        *after = Some(id);
    }
    Ok(())
}
