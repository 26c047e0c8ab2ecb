//! `GET /v1/events`: the events as server-sent events.

use super::{EventBatch, EventFilter, EventId, EventLog};
use crate::{
    desired::model::unknown_kind,
    serve::api::{ApiError, Control, control::SharedControl, routes::Params},
};
use axum::{
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use futures_util::{Stream, stream};
use serde::Deserialize;
use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, LazyLock},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Readers that may follow the stream at once: they hold connections, of which others need some too.
const READERS: usize = 64;
/// Events that a reader takes from the ring at once.
const BATCH: usize = 64;
/// Interval of comments on a quiet stream, by which both ends notice that the other is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Header of a client that continues.
const LAST_EVENT_ID: &str = "last-event-id";

/// Query of `GET /v1/events`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Beginnings of kinds, separated by commas.
    kind: Option<String>,
    service: Option<String>,
    /// Id of the event after which to continue, as in the header `Last-Event-ID`.
    after: Option<String>,
    /// Whether the answer goes on with what happens from now on.
    follow: Option<bool>,
}

/// A reader's position.
struct EventReader {
    log: Arc<EventLog>,
    filter: EventFilter,
    seq: u64,
    follow: bool,
    /// What was taken from the ring and is not sent yet: at most [`BATCH`] and a gap.
    pending: VecDeque<sse::Event>,
    _permit: OwnedSemaphorePermit,
}

pub async fn events(
    State(control): SharedControl,
    Params(query): Params<EventsQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    static PERMITS: LazyLock<Arc<Semaphore>> = LazyLock::new(|| Arc::new(Semaphore::new(READERS)));
    let EventsQuery { kind, service, after, follow } = query;
    let kinds: Vec<String> = kind.iter().flat_map(|k| k.split(',')).map(str::to_owned).collect();
    if let Some(what) = kinds.iter().find_map(|kind| unknown_kind(kind)) {
        return Err(ApiError::bad_request(what).fix("docs/reference/api.md lists the kinds"));
    }
    let header = headers.get(LAST_EVENT_ID).map(|value| value.to_str().unwrap_or_default().to_owned());
    let after =
        header.or(after).map(|id| id.parse::<EventId>()).transpose().map_err(ApiError::bad_request)?;
    let permit = PERMITS.clone().try_acquire_owned().map_err(|_| ApiError {
        status: StatusCode::SERVICE_UNAVAILABLE,
        ..ApiError::busy(format!("{READERS} readers follow the events already")).fix("try again later")
    })?;
    let (filter, follow) = (EventFilter { kinds, service }, follow.unwrap_or(true));
    let stream = read(&control, filter, after, follow, permit);
    Ok(Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

fn read(
    control: &Control,
    filter: EventFilter,
    after: Option<EventId>,
    follow: bool,
    permit: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<sse::Event, Infallible>> + use<> {
    let log = control.events.clone();
    let mut pending = VecDeque::new();
    let seq = match after {
        Some(id) if id.boot == log.boot() => id.seq.min(log.newest()),
        Some(_) => {
            pending.push_back(gap(&log, 0, "lbd was restarted: what happened in between is unknown"));
            0
        }
        None => 0,
    };
    let reader = EventReader { log, filter, seq, follow, pending, _permit: permit };
    stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await?;
        Some((Ok(event), reader))
    })
}

impl EventReader {
    /// The next event for the client; none at the end of the stream.
    async fn next(&mut self) -> Option<sse::Event> {
        let (mut newest, mut closed) = (self.log.watch(), self.log.closed());
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Some(event);
            }
            newest.mark_unchanged();
            let EventBatch { missed, events } = self.log.after(self.seq, BATCH);
            // What the filter would have left out counts too: the events are gone.
            if missed > 0 && self.seq > 0 {
                let what = format!("{missed} events were dropped before they were read");
                self.pending.push_back(gap(&self.log, self.seq + missed, &what));
            }
            match events.last() {
                Some(last) => self.seq = last.seq,
                None if !self.follow || *closed.borrow() => return None,
                None => {
                    tokio::select! {
                        changed = newest.changed() => changed.ok()?,
                        _ = closed.wait_for(|closed| *closed) => return None,
                    }
                }
            }
            for event in events.iter().filter(|event| self.filter.selects(event)) {
                let data = serde_json::to_string(&**event).expect("an event has a JSON form");
                let sent = sse::Event::default().id(event.id().to_string()).data(data);
                self.pending.push_back(sent);
            }
        }
    }
}

/// Tells of events that the client does not get.
fn gap(log: &EventLog, seq: u64, what: &str) -> sse::Event {
    let id = EventId { boot: log.boot().to_owned(), seq };
    let data = serde_json::json!({ "missed": what }).to_string();
    sse::Event::default().id(id.to_string()).event("gap").data(data)
}
