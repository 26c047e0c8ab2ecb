//! Clients of the LLM workers: one completion, or load of many, each streamed
//! and accounted for.
//!
//! In: what to ask. Out: [`Completion`]s. Used by the demo and by the tests.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use http_body_util::{BodyExt, Full};
use hyper::{Request, body::Bytes, header};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};

use super::{MODEL, targets};
use crate::{netns::Namespace, wait};

/// No completion may take longer; busy machines are slow.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between attempts at a refused connection.
const RETRY: Duration = Duration::from_millis(40);
const QUESTIONS: [&str; 6] = [
    "What is gravity?",
    "Why is the sky blue?",
    "Tell me about the sea.",
    "How do birds fly?",
    "What does a router do?",
    "Write a line about autumn.",
];

/// A chat completion to ask for, streamed.
#[derive(Clone, Debug)]
pub struct Ask {
    /// The VIP.
    pub target: SocketAddr,
    /// The user's message.
    pub question: String,
    /// Exactly so many tokens, whatever the model would rather.
    pub tokens: usize,
    /// How often a refused connection is tried before it counts as failed.
    pub attempts: u32,
}

impl Ask {
    /// One to `target`, without second attempts.
    pub fn new(target: SocketAddr, question: &str, tokens: usize) -> Self {
        Self { target, question: question.to_owned(), tokens, attempts: 1 }
    }

    fn body(&self) -> String {
        json!({
            "model": MODEL, "stream": true, "stream_options": {"include_usage": true},
            "messages": [{"role": "user", "content": self.question}],
            "temperature": 0, "max_tokens": self.tokens, "ignore_eos": true,
        })
        .to_string()
    }
}

/// A completion as it went.
#[derive(Clone, Debug)]
pub struct Completion {
    /// When it began.
    pub started: Instant,
    /// To its end.
    pub took: Duration,
    /// From the beginning to the first text.
    pub first_token: Option<Duration>,
    /// The client's end of the (last) connection.
    pub local: Option<SocketAddr>,
    /// Who served it, by `x-worker`.
    pub worker: Option<String>,
    /// The text.
    pub text: String,
    /// Events that carried text: this worker sends one a token.
    pub tokens: usize,
    /// Connection attempts that were refused before the one that counted.
    pub refused: u32,
    /// Why it failed.
    pub failure: Option<String>,
}

impl Completion {
    /// One that begins now.
    pub fn begin() -> Self {
        Self {
            started: Instant::now(),
            took: Duration::ZERO,
            first_token: None,
            local: None,
            worker: None,
            text: String::new(),
            tokens: 0,
            refused: 0,
            failure: None,
        }
    }
}

/// Asks, and calls `seen` whenever the connection, the worker or a token has come.
pub async fn complete(ask: &Ask, mut seen: impl FnMut(&Completion)) -> Completion {
    let mut completion = Completion::begin();
    let result = match timeout(PATIENCE, stream(ask, &mut completion, &mut seen)).await {
        Ok(result) => result,
        Err(_) => Err(anyhow!("not done within {PATIENCE:?}")),
    };
    completion.failure = result.err().map(|error| format!("{error:#}"));
    completion.took = completion.started.elapsed();
    completion
}

async fn stream(ask: &Ask, completion: &mut Completion, seen: &mut impl FnMut(&Completion)) -> Result<()> {
    let stream = connect(ask, completion).await?;
    completion.local = Some(stream.local_addr()?);
    seen(completion);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = Request::post("/v1/chat/completions")
        .header(header::HOST, ask.target.to_string())
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONNECTION, "close")
        .body(Full::new(Bytes::from(ask.body())))?;
    let response = sender.send_request(request).await.context("no answer")?;
    let worker = response.headers().get("x-worker").and_then(|value| value.to_str().ok());
    completion.worker = Some(worker.context("the answer has no x-worker")?.to_owned());
    seen(completion);
    let status = response.status();
    let mut body = response.into_body();
    if status != 200 {
        let said = body.collect().await.map(|said| said.to_bytes()).unwrap_or_default();
        bail!("status {status}: {}", String::from_utf8_lossy(&said));
    }
    let (mut events, mut generated, mut is_done) = (Events::default(), None, false);
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.context("the stream broke")?.into_data() else { continue };
        for event in events.feed(&data) {
            if event == "[DONE]" {
                is_done = true;
                continue;
            }
            let event: Value = serde_json::from_str(&event).with_context(|| format!("event {event:?}"))?;
            ensure!(event["error"].is_null(), "the worker said {}", event["error"]);
            generated = event["usage"]["completion_tokens"].as_u64().or(generated);
            if let Some(text) = event["choices"][0]["delta"]["content"].as_str().filter(|t| !t.is_empty()) {
                completion.first_token.get_or_insert_with(|| completion.started.elapsed());
                completion.tokens += 1;
                completion.text.push_str(text);
                seen(completion);
            }
        }
    }
    connection.abort();
    ensure!(is_done, "the stream ended without [DONE], after {} tokens", completion.tokens);
    ensure!(generated == Some(ask.tokens as u64), "{generated:?} tokens came, {} were asked for", ask.tokens);
    Ok(())
}

async fn connect(ask: &Ask, completion: &mut Completion) -> Result<TcpStream> {
    loop {
        match TcpStream::connect(ask.target).await {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) if completion.refused + 1 >= ask.attempts => {
                return Err(error).with_context(|| format!("cannot connect to {}", ask.target));
            }
            Err(_) => {
                completion.refused += 1;
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Server-sent events out of pieces that end anywhere.
#[derive(Debug, Default)]
struct Events {
    rest: Vec<u8>,
}

impl Events {
    /// The data of every event that is whole now.
    fn feed(&mut self, data: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(data);
        let mut events = Vec::new();
        while let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            events.extend(line.trim_end().strip_prefix("data: ").map(str::to_owned));
        }
        events
    }
}

/// Completions, to be counted in several ways.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// In the order in which they ended.
    pub completions: Vec<Completion>,
}

impl Account {
    /// The failed ones.
    pub fn failures(&self) -> impl Iterator<Item = &Completion> {
        self.completions.iter().filter(|completion| completion.failure.is_some())
    }

    /// The others.
    pub fn answered(&self) -> impl Iterator<Item = &Completion> {
        self.completions.iter().filter(|completion| completion.failure.is_none())
    }

    /// Answered ones by worker.
    pub fn by_worker(&self) -> BTreeMap<String, usize> {
        let mut shares = BTreeMap::new();
        for completion in self.answered() {
            *shares.entry(completion.worker.clone().unwrap_or_default()).or_default() += 1;
        }
        shares
    }

    /// What `time` says of the answered ones, at `share` (0 to 1) of their order.
    pub fn quantile(&self, share: f64, time: impl Fn(&Completion) -> Option<Duration>) -> Duration {
        let mut times: Vec<Duration> = self.answered().filter_map(time).collect();
        times.sort_unstable();
        let last = times.len().saturating_sub(1);
        times.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
    }
}

/// What load to make: each completion on a connection of its own, both families.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Concurrent clients.
    pub clients: usize,
    /// Tokens of each completion.
    pub tokens: usize,
    /// See [`Ask::attempts`].
    pub attempts: u32,
}

/// Load in progress; stops when dropped.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    load: Load,
    account: Mutex<Account>,
    open: Mutex<Open>,
    tokens: AtomicUsize,
    stop: AtomicBool,
}

#[derive(Debug)]
struct Open {
    /// What each client is about.
    clients: Vec<Option<Completion>>,
    /// Nobody begins.
    is_held: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no client panics while it holds the account")
}

impl Running {
    /// Starts the load in `namespace`.
    pub fn start(namespace: &Namespace, load: Load) -> Result<Self> {
        let shared = Arc::new(Shared {
            load,
            account: Mutex::default(),
            open: Mutex::new(Open { clients: vec![None; load.clients], is_held: false }),
            tokens: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let clients = shared.clone();
        let thread = namespace.spawn_async(move || async move {
            let mut tasks = tokio::task::JoinSet::new();
            (0..clients.load.clients).for_each(|number| drop(tasks.spawn(client(clients.clone(), number))));
            tasks.join_all().await;
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Takes what has ended since the last call.
    pub fn take(&self) -> Account {
        std::mem::take(&mut *lock(&self.shared.account))
    }

    /// Takes the number of tokens that have come since the last call.
    pub fn take_tokens(&self) -> usize {
        self.shared.tokens.swap(0, Ordering::Relaxed)
    }

    /// Looks at what has ended since the last [`Self::take`].
    pub fn look<T>(&self, look: impl FnOnce(&Account) -> T) -> T {
        look(&lock(&self.shared.account))
    }

    /// Completions under way whose text is coming, by worker.
    pub fn streaming(&self) -> BTreeMap<String, usize> {
        let mut found = BTreeMap::new();
        for completion in lock(&self.shared.open).clients.iter().flatten().filter(|open| open.tokens > 0) {
            *found.entry(completion.worker.clone().unwrap_or_default()).or_default() += 1;
        }
        found
    }

    /// Runs `work` while completions go on and none begins, so that what is found
    /// to be open in it is all there is.
    pub fn hold<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        lock(&self.shared.open).is_held = true;
        let connected = wait::until("no client is connecting", PATIENCE, || {
            lock(&self.shared.open).clients.iter().flatten().all(|open| open.local.is_some())
        });
        let result = connected.and_then(|_| work());
        lock(&self.shared.open).is_held = false;
        result
    }

    /// Stops, lets every completion under way end, and returns what is left.
    pub fn finish(mut self) -> Result<Account> {
        self.stop()?;
        Ok(self.take())
    }

    fn stop(&mut self) -> Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("the load generator panicked")),
            None => Ok(()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

async fn client(shared: Arc<Shared>, number: usize) {
    let targets = targets();
    let mut turn = number;
    while !shared.stop.load(Ordering::Relaxed) {
        if !may_begin(&shared, number) {
            tokio::time::sleep(Duration::from_millis(2)).await;
            continue;
        }
        let question = QUESTIONS[turn % QUESTIONS.len()];
        let Load { tokens, attempts, .. } = shared.load;
        let ask = Ask { attempts, ..Ask::new(targets[turn % targets.len()], question, tokens) };
        turn += 1;
        let mut known = 0;
        let completion = complete(&ask, |now| {
            shared.tokens.fetch_add(now.tokens - known, Ordering::Relaxed);
            known = now.tokens;
            lock(&shared.open).clients[number] = Some(now.clone());
        });
        let completion = completion.await;
        lock(&shared.open).clients[number] = None;
        let has_failed = completion.failure.is_some();
        lock(&shared.account).completions.push(completion);
        if has_failed {
            tokio::time::sleep(RETRY).await;
        }
    }
}

fn may_begin(shared: &Shared, number: usize) -> bool {
    let mut open = lock(&shared.open);
    if !open.is_held {
        open.clients[number] = Some(Completion::begin());
    }
    !open.is_held
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_come_whole_out_of_pieces() {
        let mut events = Events::default();
        assert!(events.feed(b"data: {\"a\"").is_empty());
        assert_eq!(events.feed(b": 1}\n\ndata: [DO"), ["{\"a\": 1}"]);
        assert_eq!(events.feed(b"NE]\n\n"), ["[DONE]"]);
    }
}
