//! Tests the watcher against workers on the loopback interface with valid, invalid, slow or no reports.

use super::{
    ReplicaRegistry, Scores, Watcher,
    scores::tests::{Fake, Fixed},
};
use crate::{
    desired::{
        model::{BackendId, Desired, Readiness},
        store::{Local, Revision, StoreError, Stored},
    },
    observed::health::prober,
};
use futures_util::future::BoxFuture;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    task::JoinSet,
};

/// Handles a request, given its text.
type Script = Arc<dyn Fn(String, TcpStream) -> BoxFuture<'static, ()> + Send + Sync>;

/// A worker whose next report can be set, and which can be killed.
struct Worker {
    address: SocketAddr,
    say: Arc<watch::Sender<String>>,
    task: tokio::task::JoinHandle<()>,
}

const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n";
const JSON: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n";

fn report(phase: &str, running: u32) -> String {
    format!(
        r#"{{"protocol":1,"phase":"{phase}","model":"m","running":{running},"waiting":0,"capacity":{{"running":8}}}}"#
    )
}

fn event(text: &str) -> String {
    format!("event: replica\ndata: {text}\n\n")
}

impl Worker {
    /// Serves a script on the given port; 0 for any port.
    async fn start(port: u16, script: Script) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let task = tokio::spawn(async move {
            let mut open = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let script = script.clone();
                open.spawn(async move {
                    let mut request = vec![0; 4_096];
                    let n = stream.read(&mut request).await.unwrap_or(0);
                    script(String::from_utf8_lossy(&request[..n]).into_owned(), stream).await;
                });
            }
        });
        Self { address, say: Arc::new(watch::Sender::new(String::new())), task }
    }

    /// Streams each report that is set, from the first on; answers JSON to requests without a stream.
    async fn streaming(port: u16, first: String) -> Self {
        let say = Arc::new(watch::Sender::new(first));
        let told = say.clone();
        let script: Script = Arc::new(move |request, mut stream| {
            let mut told = told.subscribe();
            Box::pin(async move {
                if !request.contains("text/event-stream") {
                    let text = format!("{JSON}{}", *told.borrow());
                    let _ = stream.write_all(text.as_bytes()).await;
                    return;
                }
                let _ = stream.write_all(STREAM.as_bytes()).await;
                loop {
                    let text = event(&told.borrow_and_update());
                    if stream.write_all(text.as_bytes()).await.is_err() {
                        return;
                    }
                    // Wait for a change or the heartbeat.
                    let _ = tokio::time::timeout(Duration::from_millis(100), told.changed()).await;
                }
            })
        });
        let worker = Self::start(port, script).await;
        Self { say, ..worker }
    }

    fn say(&self, text: String) {
        self.say.send_replace(text);
    }

    /// Closes all sockets, like a killed process.
    fn kill(self) {
        self.task.abort();
    }
}

#[derive(Default)]
struct Memory(Mutex<Option<Vec<u8>>>);

impl Local for Memory {
    fn load(&self, _: &'static str) -> BoxFuture<'_, Result<Option<Vec<u8>>, StoreError>> {
        Box::pin(async { Ok(self.0.lock().unwrap().clone()) })
    }
    fn save(&self, _: &'static str, value: Vec<u8>) -> BoxFuture<'_, Result<(), StoreError>> {
        *self.0.lock().unwrap() = Some(value);
        Box::pin(async { Ok(()) })
    }
}

/// A watcher of one replica.
struct Bed {
    book: Arc<ReplicaRegistry>,
    said: mpsc::Receiver<(BackendId, Readiness)>,
    fake: Arc<Fake>,
    state: watch::Sender<Stored>,
    local: Arc<Memory>,
    task: tokio::task::JoinHandle<()>,
}

fn id() -> BackendId {
    BackendId { service: "s".parse().unwrap(), backend: "w".parse().unwrap() }
}

fn stored(port: u16, replica: &str) -> Stored {
    let mut source: serde_json::Value = serde_json::from_str(replica).unwrap();
    source["port"] = port.into();
    let desired = serde_json::json!({"services": {"s": {"vip": "10.0.0.1", "port": 80, "protocol": "tcp",
        "replica": source, "backends": {"w": {"address": "127.0.0.1"}}}}});
    let revision =
        Revision { number: 1, author: String::new(), time_ms: 0, message: String::new(), summary: None };
    Stored { revision, desired: Arc::new(serde_json::from_value(desired).unwrap()) }
}

impl Bed {
    async fn new(port: u16, replica: &str) -> Self {
        Self::with(port, replica, Arc::default()).await
    }

    async fn with(port: u16, replica: &str, local: Arc<Memory>) -> Self {
        let stored = stored(port, replica);
        let fake = Arc::new(Fake::default());
        let places = Fixed(Mutex::new(vec![(id(), 7)]), Arc::new(Desired::clone(&stored.desired)));
        let scores = Arc::new(Scores::new(fake.clone(), Arc::new(places)));
        let (tell, said) = mpsc::channel(100);
        let book = Watcher::restore(&*local).await;
        let watcher = Watcher::new(book.clone(), 4, prober(), tell, scores);
        let state = watch::Sender::new(stored);
        let task = tokio::spawn(watcher.run(state.subscribe(), local.clone()));
        Self { book, said, fake, state, local, task }
    }

    /// The next change of readiness.
    async fn next(&mut self) -> Readiness {
        let next = tokio::time::timeout(Duration::from_secs(10), self.said.recv()).await;
        next.unwrap_or_else(|_| panic!("nothing was said: {:?}", self.book.get(&id()))).unwrap().1
    }

    /// Waits until the entry fulfils a condition.
    async fn until(&self, what: &str, holds: impl Fn(&super::ReplicaEntry) -> bool) -> super::ReplicaEntry {
        let start = Instant::now();
        loop {
            let entry = self.book.get(&id());
            match entry {
                Some(entry) if holds(&entry) => return entry,
                other => assert!(start.elapsed() < Duration::from_secs(10), "never {what}: {other:?}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    fn last_score(&self) -> Option<(u32, u32)> {
        self.fake.0.lock().unwrap().last().copied()
    }
}

const FAST: &str = r#"{"kind":"stream","interval_ms":200,"timeout_ms":400}"#;

#[tokio::test]
async fn a_stream_tells_readiness_and_load_at_once() {
    let worker = Worker::streaming(0, report("loading", 0)).await;
    let mut bed = Bed::new(worker.address.port(), FAST).await;
    assert_eq!(bed.next().await, Readiness::Loading);
    worker.say(report("ready", 4));
    assert_eq!(bed.next().await, Readiness::Ready);
    assert_eq!(bed.last_score(), Some((7, 500_000)), "half of its capacity, at the backend's index");

    // From what the worker writes to the array; the median, since other tests share the processor.
    let mut took: Vec<Duration> = Vec::new();
    for running in 0..21 {
        let start = Instant::now();
        worker.say(report("ready", running));
        let expected = Some((7, running * 125_000));
        while bed.last_score() != expected {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        took.push(start.elapsed());
    }
    took.sort();
    println!("report to array: median {:?}, worst {:?}", took[10], took[20]);
    assert!(took[10] < Duration::from_millis(10), "{took:?}");

    let start = Instant::now();
    worker.say(report("draining", 3));
    assert_eq!(bed.next().await, Readiness::Draining);
    println!("drain signal: {:?}", start.elapsed());
    let entry = bed.book.get(&id()).unwrap();
    assert!(entry.streaming && entry.breaks == 0 && entry.report.unwrap().running == 3);
}

#[tokio::test]
async fn a_killed_worker_is_lost_at_once_and_comes_back() {
    let worker = Worker::streaming(0, report("ready", 1)).await;
    let port = worker.address.port();
    let mut bed = Bed::new(port, FAST).await;
    assert_eq!(bed.next().await, Readiness::Ready);
    let start = Instant::now();
    worker.kill();
    assert_eq!(bed.next().await, Readiness::Lost);
    println!("killed to lost: {:?}", start.elapsed());
    let entry = bed.book.get(&id()).unwrap();
    let reason = &entry.history.back().unwrap().reason;
    assert!(reason.contains("probe: connection refused"), "{reason}");
    assert!(entry.report.is_some(), "the last good report stands");
    let worker = Worker::streaming(port, report("loading", 0)).await;
    assert_eq!(bed.next().await, Readiness::Loading);
    worker.say(report("ready", 0));
    assert_eq!(bed.next().await, Readiness::Ready);
}

#[tokio::test]
async fn a_stream_that_breaks_while_the_worker_lives_changes_nothing() {
    let opened = Arc::new(Mutex::new(0));
    let count = opened.clone();
    let script: Script = Arc::new(move |request, mut stream| {
        let count = count.clone();
        Box::pin(async move {
            if request.is_empty() {
                return; // A probe.
            }
            let (head, text) = if request.contains("event-stream") {
                *count.lock().unwrap() += 1;
                (STREAM, event(&report("ready", 2)))
            } else {
                (JSON, report("ready", 5))
            };
            let _ = stream.write_all(format!("{head}{text}").as_bytes()).await;
        })
    });
    let worker = Worker::start(0, script).await;
    let mut bed =
        Bed::new(worker.address.port(), r#"{"kind":"stream","interval_ms":50,"timeout_ms":400}"#).await;
    assert_eq!(bed.next().await, Readiness::Ready);
    // After short-lived streams, the watcher polls.
    bed.until("looks", |e| e.reports > 8 && e.report.as_ref().is_some_and(|r| r.running == 5)).await;
    assert_eq!(*opened.lock().unwrap(), 3);
    assert!(bed.said.try_recv().is_err(), "it was never lost");
}

#[tokio::test]
async fn a_lying_replica_is_named_and_its_last_good_state_kept() {
    let worker = Worker::streaming(0, report("ready", 4)).await;
    let mut bed = Bed::new(worker.address.port(), FAST).await;
    assert_eq!(bed.next().await, Readiness::Ready);
    for (lie, expected) in [
        (r#"{"phase":"ready","running":-1,"waiting":0}"#, "running is -1, must be 0 to 1000000"),
        (r#"{"phase":"ready","running":1e30,"waiting":0}"#, "running is 1"),
        (r#"{"phase":"ready","running":NaN,"waiting":0}"#, "not JSON"),
        (r#"{"phase":"failed","running":0}"#, "waiting is missing"),
        (r#"{"phase":"draining","running":0,"waiting":0,"protocol":9}"#, "protocol 9"),
        ("hello", "not JSON"),
    ] {
        worker.say(lie.to_owned());
        let named = |e: &super::ReplicaEntry| e.trouble.as_ref().is_some_and(|t| t.what.contains(expected));
        let entry = bed.until(expected, named).await;
        assert_eq!((entry.readiness, entry.report.unwrap().running), (Readiness::Ready, 4), "{lie}");
        assert!(entry.streaming, "{lie}");
    }
    worker.say(report("ready", 6));
    let entry = bed.until("true again", |e| e.trouble.is_none()).await;
    assert!(entry.refused >= 6 && entry.breaks == 0, "{entry:?}");
    assert!(bed.said.try_recv().is_err());
}

/// Streams one valid report and then the given pieces; returns whether the reader closed the connection.
fn then(pieces: Vec<Vec<u8>>, pause: Duration, hung_up: mpsc::Sender<()>) -> Script {
    Arc::new(move |request, mut stream| {
        let (pieces, hung_up) = (pieces.clone(), hung_up.clone());
        Box::pin(async move {
            if request.is_empty() {
                return;
            }
            let head = format!("{STREAM}{}", event(&report("ready", 1)));
            let _ = stream.write_all(head.as_bytes()).await;
            for piece in pieces {
                tokio::time::sleep(pause).await;
                if stream.write_all(&piece).await.is_err() {
                    let _ = hung_up.send(()).await;
                    return;
                }
            }
            // Read until the other end closes.
            let _ = stream.read(&mut [0; 16]).await;
            let _ = hung_up.send(()).await;
        })
    })
}

#[tokio::test]
async fn what_is_too_large_too_slow_or_silent_is_hung_up_on() {
    let ms = Duration::from_millis;
    let megabytes: Vec<Vec<u8>> = (0..160).map(|_| vec![b'x'; 64 * 1024]).collect();
    let trickle: Vec<Vec<u8>> = (0..500).map(|_| b"d".to_vec()).collect();
    let comments: Vec<Vec<u8>> = (0..500).map(|_| b": still here\n\n".to_vec()).collect();
    for (pieces, pause, expected) in [
        (megabytes, ms(0), "the report has more than 65536 bytes"),
        (trickle, ms(20), "a report took longer than 200 ms"),
        (comments, ms(20), "the time without a report took longer than 350 ms"),
        (vec![], ms(0), "the time without a report took longer than 350 ms"),
    ] {
        let (hung_up, mut was_hung_up) = mpsc::channel(10);
        let worker = Worker::start(0, then(pieces, pause, hung_up)).await;
        let settings = r#"{"kind":"stream","interval_ms":50,"timeout_ms":200}"#;
        let mut bed = Bed::new(worker.address.port(), settings).await;
        assert_eq!(bed.next().await, Readiness::Ready);
        // A new stream soon clears the error with a valid report.
        let start = Instant::now();
        let mut seen = String::new();
        while !seen.contains(expected) {
            assert!(start.elapsed() < Duration::from_secs(10), "{expected}: {seen}");
            if let Some(trouble) = bed.book.get(&id()).and_then(|e| e.trouble) {
                seen = trouble.what;
            }
            tokio::time::sleep(Duration::from_micros(300)).await;
        }
        tokio::time::timeout(Duration::from_secs(5), was_hung_up.recv()).await.expect(expected);
        assert!(bed.said.try_recv().is_err(), "{expected}: it lives, and is not lost");
    }
}

#[tokio::test]
async fn a_metrics_page_is_read_at_intervals() {
    let page = Arc::new(Mutex::new(include_str!("../../../tests/replica/vllm.txt").to_owned()));
    let shown = page.clone();
    let script: Script = Arc::new(move |request, mut stream| {
        let page = shown.lock().unwrap().clone();
        Box::pin(async move {
            if request.starts_with("GET /metrics ") {
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\nconnection: close\r\n\r\n";
                let _ = stream.write_all(format!("{head}{page}").as_bytes()).await;
            }
        })
    });
    let worker = Worker::start(0, script).await;
    let settings = r#"{"kind":"vllm","interval_ms":30,"timeout_ms":400,"capacity":64}"#;
    let mut bed = Bed::new(worker.address.port(), settings).await;
    assert_eq!(bed.next().await, Readiness::Ready);
    let entry =
        bed.until("a rate", |e| e.report.as_ref().is_some_and(|r| r.tokens_per_second.is_some())).await;
    // The cache at 0.9813, 4 × 72 waiting of 64 places, and 0.813 of the pressure.
    let expected: u32 = 981_300 + 4_500_000 + 813_000;
    assert!(entry.score.is_some_and(|s| s.abs_diff(expected) < 3), "{:?}", entry.score);
    *page.lock().unwrap() = "<html>".to_owned();
    let entry = bed.until("refused", |e| e.refused > 2).await;
    assert_eq!(
        entry.trouble.unwrap().what,
        "report refused: line 1 is not a valid metric: the line does not begin with a metric name"
    );
    assert_eq!((entry.readiness, entry.report.unwrap().waiting), (Readiness::Ready, 72));
    worker.kill();
    assert_eq!(bed.next().await, Readiness::Lost);
}

#[tokio::test]
async fn the_last_word_survives_a_restart_and_ends_with_the_question() {
    let worker = Worker::streaming(0, report("draining", 1)).await;
    let port = worker.address.port();
    let mut bed = Bed::new(port, FAST).await;
    assert_eq!(bed.next().await, Readiness::Draining);
    for _ in 0..500 {
        if bed.local.0.lock().unwrap().is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bed.task.abort();
    worker.kill();
    let mut bed = Bed::with(port, FAST, bed.local.clone()).await;
    assert_eq!(bed.book.readiness()[&id()], Readiness::Draining);
    assert_eq!(bed.next().await, Readiness::Lost);
    let mut without = Desired::clone(&bed.state.borrow().desired);
    without.service_mut(&"s".parse().unwrap()).unwrap().replica = None;
    bed.state.send_modify(|s| s.desired = Arc::new(without));
    assert_eq!(bed.next().await, Readiness::Unknown);
    assert!(bed.book.get(&id()).is_none());
}
