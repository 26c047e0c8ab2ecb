//! Events over a real socket and store, with an engine in memory.

use super::{CAUSE, EventBatch, EventFilter, EventId, EventLog, EventRecord, EventSubject, derive::news};
use crate::{
    lbctl::client::{ClientError, EventMessage, EventStream},
    serve::api::tests::{Bed, bed, web},
};
use reqwest::Method;
use serde_json::{Value, json};
use std::{collections::VecDeque, time::Duration};

async fn open(bed: &Bed, query: &[(&str, &str)]) -> EventStream {
    bed.client.event_stream("/v1/events", &query).await.expect("a stream")
}

async fn next(stream: &mut EventStream) -> EventMessage {
    let next = tokio::time::timeout(Duration::from_secs(10), stream.next()).await;
    next.expect("in time").expect("a sound stream").expect("the stream goes on")
}

fn record(message: &EventMessage) -> EventRecord {
    serde_json::from_str(&message.data).expect("an event")
}

/// Reads up to an event of this kind.
async fn until(stream: &mut EventStream, kind: &str) -> (String, EventRecord) {
    loop {
        let message = next(stream).await;
        let event = record(&message);
        if event.kind == kind {
            return (message.id, event);
        }
    }
}

/// All events so far.
async fn all(bed: &Bed, query: &[(&str, &str)]) -> Vec<EventMessage> {
    let mut stream = open(bed, &[query, &[("follow", "false")]].concat()).await;
    let mut found = Vec::new();
    while let Some(message) = stream.next().await.expect("a sound stream") {
        found.push(message);
    }
    found
}

#[tokio::test]
async fn changes_drains_and_failures_are_told_in_order() {
    let bed = bed(true).await;
    tokio::spawn(bed.control.clone().run_events());
    let mut stream = open(&bed, &[]).await;
    let first = record(&next(&mut stream).await);
    assert_eq!((first.seq, &*first.kind), (1, "lbd.started"));
    let mut service = web();
    service["drain_s"] = json!(1);
    bed.send(Method::POST, "/v1/services/web?message=first", service).await.unwrap();
    let (_, applied) = until(&mut stream, "revision.applied").await;
    assert_eq!(applied.revision, 1);
    assert!(applied.cause.starts_with("by ann: + service web (first)"), "{}", applied.cause);
    bed.send(Method::POST, "/v1/services/web/backends/a/drain", Value::Null).await.unwrap();
    let (id, begun) = until(&mut stream, "backend.drain.begun").await;
    assert!(begun.subject.to_string() == "web/a" && begun.seq > applied.seq, "{begun:?}");
    let (_, ended) = until(&mut stream, "backend.drain.ended").await;
    assert!(ended.cause.starts_with("the drain time is over"), "{}", ended.cause);
    // Its end was told; that the operator ends it later is none.
    bed.send(Method::POST, "/v1/services/web/backends/a/undrain", Value::Null).await.unwrap();

    bed.engine.set_failure(Some("no memory".to_owned()));
    let failed = bed.error(Method::PATCH, "/v1/services/web", json!({"drain_s": 2})).await;
    assert_eq!(failed.0, "not_applied");
    let (_, event) = until(&mut stream, "apply.failed").await;
    assert_eq!(event.cause, "revision 4: no memory");
    let (_, problem) = until(&mut stream, "problem.begun").await;
    assert_eq!(problem.cause, "revision 4 is not applied: no memory");
    bed.engine.set_failure(None);
    until(&mut stream, "revision.applied").await;
    until(&mut stream, "problem.ended").await;

    let kinds = |found: &[EventMessage]| -> Vec<String> {
        found.iter().map(|message| record(message).kind.into_owned()).collect()
    };
    let drains = all(&bed, &[("kind", "backend.drain"), ("service", "web")]).await;
    assert_eq!(kinds(&drains), ["backend.drain.begun", "backend.drain.ended"]);
    assert!(all(&bed, &[("service", "other")]).await.is_empty());
    let later = all(&bed, &[("after", &id), ("kind", "backend,problem")]).await;
    assert_eq!(kinds(&later), ["backend.drain.ended", "problem.begun", "problem.ended"]);
    let everything = all(&bed, &[]).await;
    let numbers: Vec<u64> = everything.iter().map(|message| record(message).seq).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());

    // A reader of another run of lbd is told, and gets what there is.
    let restarted = all(&bed, &[("after", "00000000-7")]).await;
    assert_eq!((restarted[0].event.as_str(), restarted.len()), ("gap", everything.len() + 1));
    for (query, words) in [
        ([("kind", "backend.dwn")], "did you mean backend.down?"),
        ([("after", "7")], "is not the id of an event"),
        ([("follow", "often")], "follow"),
    ] {
        match bed.client.event_stream("/v1/events", &query).await {
            Err(ClientError::Refused { info }) => assert!(info.message.contains(words), "{}", info.message),
            other => panic!("{query:?}: {:?}", other.map(drop)),
        }
    }

    // When lbd stops, readers leave.
    bed.control.events().close();
    let end = tokio::time::timeout(Duration::from_secs(10), async {
        while stream.next().await.expect("a sound stream").is_some() {}
    });
    end.await.expect("the stream ends");
}

#[tokio::test]
async fn readers_are_limited() {
    let bed = bed(true).await;
    let mut streams = Vec::new();
    // Other tests of this process read too.
    let refused = loop {
        match bed.client.event_stream("/v1/events", &()).await {
            Ok(stream) => streams.push(stream),
            Err(ClientError::Refused { info }) => break info,
            Err(other) => panic!("{other}"),
        }
        assert!(streams.len() <= 64);
    };
    assert_eq!(refused.code, "busy");
    streams.clear();
    let again = async {
        while bed.client.event_stream("/v1/events", &()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again).await.expect("who leaves makes room");
}

#[test]
fn no_change_of_a_history_is_lost_or_told_twice() {
    let history: VecDeque<u32> = [3, 4, 5].into();
    let after = |last: Option<u32>| news(&history, last.as_ref()).copied().collect::<Vec<_>>();
    assert_eq!(after(Some(4)), [5]);
    assert_eq!(after(Some(5)), [] as [u32; 0]);
    assert_eq!(after(Some(1)), [3, 4, 5], "the last one seen has left the history");
    assert_eq!(after(None), [3, 4, 5]);
}

fn add(log: &EventLog, kind: &'static str, service: &str) {
    let service = service.parse().expect("a name");
    log.add(kind, EventSubject::of_service(&service), "for a test", 7);
}

#[test]
fn a_reader_reads_on_and_is_told_what_it_missed() {
    let log = EventLog::keeping(3);
    assert_eq!(log.after(0, 10), EventBatch::default());
    add(&log, "panic.begun", "a");
    add(&log, "panic.ended", "a");
    let numbers = |batch: &EventBatch| batch.events.iter().map(|e| e.seq).collect::<Vec<_>>();
    assert_eq!(numbers(&log.after(0, 10)), [1, 2]);
    assert_eq!(numbers(&log.after(1, 10)), [2]);
    assert_eq!(log.after(2, 10), EventBatch::default());
    for _ in 0..5 {
        add(&log, "panic.begun", "b");
    }
    let late = log.after(1, 2);
    assert_eq!((late.missed, numbers(&late)), (3, vec![5, 6]));
    assert_eq!(log.after(6, 2).missed, 0);
    assert_eq!(log.ring().len(), 3);
}

#[test]
fn filters_take_whole_words_of_a_kind() {
    let log = EventLog::default();
    add(&log, "backend.drain.begun", "web");
    let event = log.after(0, 1).events.remove(0);
    let selects = |kinds: &[&str], service: Option<&str>| {
        let kinds = kinds.iter().map(|kind| (*kind).to_owned()).collect();
        EventFilter { kinds, service: service.map(str::to_owned) }.selects(&event)
    };
    assert!(selects(&[], None) && selects(&["backend"], None) && selects(&["backend.drain"], Some("web")));
    assert!(selects(&["vip", "backend.drain.begun"], None));
    assert!(!selects(&["back"], None) && !selects(&["backend.d"], None) && !selects(&[], Some("api")));
}

#[test]
fn ids_are_read_as_they_are_written() {
    let id = EventId { boot: "0123abcd".to_owned(), seq: 9 };
    assert_eq!(id.to_string().parse(), Ok(id));
    assert!("9".parse::<EventId>().is_err() && "a-b".parse::<EventId>().is_err());
}

#[test]
fn a_long_cause_is_cut() {
    let log = EventLog::default();
    log.add("apply.failed", EventSubject::default(), &"ä".repeat(CAUSE), 0);
    assert_eq!(log.after(0, 1).events[0].cause.len(), CAUSE);
}
