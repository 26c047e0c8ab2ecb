//! An HTTP client that accounts for every request: which worker answered, how
//! long it took, and what went wrong.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::netns::Namespace;

/// No request may take longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What load to make.
#[derive(Clone, Debug)]
pub struct Load {
    /// Where to: requests take these in turn.
    pub targets: Vec<SocketAddr>,
    /// Concurrent clients that open a connection for each request.
    pub closing: usize,
    /// Concurrent clients that keep one connection for all their requests.
    pub keeping: usize,
    /// Each client's pause between requests.
    pub pause: Duration,
    /// How often a refused or unanswered connection attempt is repeated before
    /// the request counts as failed, as any HTTP client does.
    pub attempts: u32,
}

impl Load {
    /// A moderate mix against `targets`, without second attempts.
    pub fn new(targets: Vec<SocketAddr>) -> Self {
        Self { targets, closing: 6, keeping: 6, pause: Duration::from_millis(10), attempts: 1 }
    }
}

/// Requests that arrive whether or not earlier ones have been answered, each on a connection of its own.
#[derive(Clone, Debug)]
pub struct Arrivals {
    /// Where to.
    pub target: SocketAddr,
    /// Requests per second now; may be changed at any time.
    pub per_second: Arc<AtomicU32>,
}

impl Arrivals {
    /// Starts them in `namespace`. Requests that are under way at the end are awaited.
    pub fn start(self, namespace: &Namespace) -> Result<Running> {
        let load = Load::new(vec![self.target]);
        Running::start_with(namespace, load, |shared| arrive(shared, self.per_second))
    }
}

async fn arrive(shared: Shared, per_second: Arc<AtomicU32>) {
    let mut requests = tokio::task::JoinSet::new();
    let mut next = tokio::time::Instant::now();
    while !shared.stop.load(Ordering::Relaxed) {
        tokio::time::sleep_until(next).await;
        next += Duration::from_secs(1) / per_second.load(Ordering::Relaxed).max(1);
        let shared = shared.clone();
        requests.spawn(async move { request(&shared, shared.load.targets[0], &mut None, false).await });
        while requests.try_join_next().is_some() {}
    }
    requests.join_all().await;
}

/// One request as it went.
#[derive(Clone, Debug)]
pub struct Request {
    /// When it began.
    pub started: Instant,
    /// From the first connection attempt to the last byte.
    pub took: Duration,
    /// The client's side of the (last) connection.
    pub local: Option<SocketAddr>,
    /// The VIP.
    pub target: SocketAddr,
    /// Who answered; for a failed request on a kept connection, who had been
    /// answering there.
    pub worker: Option<String>,
    /// Connection attempts that were refused before the one that counted.
    pub refused: u32,
    /// Why it failed.
    pub failure: Option<String>,
}

/// Requests, to be counted in several ways.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// In the order in which they ended.
    pub requests: Vec<Request>,
}

impl Account {
    /// How many requests failed.
    pub fn failed(&self) -> usize {
        self.requests.iter().filter(|request| request.failure.is_some()).count()
    }

    /// Requests whose first connection attempt was refused.
    pub fn retried(&self) -> usize {
        self.requests.iter().filter(|request| request.refused > 0).count()
    }

    /// The failed ones.
    pub fn failures(&self) -> impl Iterator<Item = &Request> {
        self.requests.iter().filter(|request| request.failure.is_some())
    }

    /// Answered requests by worker.
    pub fn by_worker(&self) -> BTreeMap<String, usize> {
        let mut shares = BTreeMap::new();
        for request in self.requests.iter().filter(|request| request.failure.is_none()) {
            *shares.entry(request.worker.clone().unwrap_or_default()).or_default() += 1;
        }
        shares
    }

    /// The answered requests' time at `share` (0 to 1) of their order.
    pub fn quantile(&self, share: f64) -> Duration {
        let mut times: Vec<Duration> =
            self.requests.iter().filter(|request| request.failure.is_none()).map(|r| r.took).collect();
        times.sort_unstable();
        let last = times.len().saturating_sub(1);
        times.get((last as f64 * share).round() as usize).copied().unwrap_or_default()
    }
}

/// Load in progress; stops when dropped.
#[derive(Debug)]
pub struct Running {
    account: Arc<Mutex<Account>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts the load in `namespace`.
    pub fn start(namespace: &Namespace, load: Load) -> Result<Self> {
        Self::start_with(namespace, load, run)
    }

    fn start_with<F: Future<Output = ()>>(
        namespace: &Namespace,
        load: Load,
        make: impl FnOnce(Shared) -> F + Send + 'static,
    ) -> Result<Self> {
        let account = Arc::new(Mutex::new(Account::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let shared = Shared { account: account.clone(), stop: stop.clone(), load: Arc::new(load) };
        let thread = namespace.spawn_async(move || make(shared))?;
        Ok(Self { account, stop, thread: Some(thread) })
    }

    /// Takes what has ended since the last call.
    pub fn take(&self) -> Account {
        std::mem::take(&mut *lock(&self.account))
    }

    /// How many requests have ended since the last [`Self::take`].
    pub fn count(&self) -> usize {
        lock(&self.account).requests.len()
    }

    /// Stops, lets every request under way end, and returns what is left.
    pub fn finish(mut self) -> Result<Account> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the load generator panicked"))?;
        }
        Ok(self.take())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Clone)]
struct Shared {
    account: Arc<Mutex<Account>>,
    stop: Arc<AtomicBool>,
    load: Arc<Load>,
}

fn lock(account: &Mutex<Account>) -> MutexGuard<'_, Account> {
    account.lock().expect("no client panics while it holds the account")
}

async fn run(shared: Shared) {
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..shared.load.closing {
        clients.spawn(client(shared.clone(), number, false));
    }
    for number in 0..shared.load.keeping {
        clients.spawn(client(shared.clone(), number, true));
    }
    clients.join_all().await;
}

async fn client(shared: Shared, number: usize, keep: bool) {
    let load = &shared.load;
    let mut kept: Option<(Connection, Option<String>)> = None;
    let mut turn = number;
    while !shared.stop.load(Ordering::Relaxed) {
        let target = kept.as_ref().map_or(load.targets[turn % load.targets.len()], |(kept, _)| kept.target);
        turn += 1;
        request(&shared, target, &mut kept, keep).await;
        tokio::time::sleep(load.pause).await;
    }
}

/// Makes one request and accounts for it.
async fn request(
    shared: &Shared,
    target: SocketAddr,
    kept: &mut Option<(Connection, Option<String>)>,
    keep: bool,
) {
    let mut request = Request {
        started: Instant::now(),
        took: Duration::ZERO,
        local: None,
        target,
        worker: None,
        refused: 0,
        failure: None,
    };
    match attempt(&shared.load, kept, &mut request, keep).await {
        Ok(answer) => request.worker = Some(answer),
        Err(error) => request.failure = Some(format!("{error:#}")),
    }
    request.took = request.started.elapsed();
    lock(&shared.account).requests.push(request);
}

async fn attempt(
    load: &Load,
    kept: &mut Option<(Connection, Option<String>)>,
    request: &mut Request,
    keep: bool,
) -> Result<String> {
    let (mut connection, known) = match kept.take() {
        Some(pair) => pair,
        None => (connect_patiently(load, request).await?, None),
    };
    request.local = Some(connection.local);
    request.worker = known;
    let answer = connection.get("/", keep).await?;
    anyhow::ensure!(answer.status == 200, "status {}", answer.status);
    let worker = String::from_utf8_lossy(&answer.body).trim().to_owned();
    if keep {
        *kept = Some((connection, Some(worker.clone())));
    }
    Ok(worker)
}

async fn connect_patiently(load: &Load, request: &mut Request) -> Result<Connection> {
    loop {
        match Connection::open(request.target).await {
            Ok(connection) => return Ok(connection),
            Err(error) if request.refused + 1 >= load.attempts => return Err(error),
            Err(_) => {
                request.refused += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// An answer, whole.
#[derive(Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The `X-Worker` header.
    pub worker: Option<String>,
    /// The body.
    pub body: Vec<u8>,
}

/// One connection that speaks as much HTTP/1.1 as the workers' replies need.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
    /// The client's side.
    pub local: SocketAddr,
    /// The VIP.
    pub target: SocketAddr,
}

impl Connection {
    /// Connects to `target`.
    pub async fn open(target: SocketAddr) -> Result<Self> {
        let stream = timeout(PATIENCE, TcpStream::connect(target))
            .await
            .with_context(|| format!("no connection to {target} within {PATIENCE:?}"))?
            .with_context(|| format!("cannot connect to {target}"))?;
        stream.set_nodelay(true)?;
        let local = stream.local_addr()?;
        Ok(Self { stream: BufReader::new(stream), local, target })
    }

    /// `GET path`, to the end of the answer.
    pub async fn get(&mut self, path: &str, keep: bool) -> Result<Answer> {
        timeout(PATIENCE, self.exchange("GET", path, &[], keep))
            .await
            .with_context(|| format!("no answer within {PATIENCE:?}"))?
    }

    /// `POST path` with `body`, to the end of the answer, within `patience`.
    pub async fn post(&mut self, path: &str, body: &[u8], patience: Duration) -> Result<Answer> {
        timeout(patience, self.exchange("POST", path, body, false))
            .await
            .with_context(|| format!("no answer to {} bytes within {patience:?}", body.len()))?
    }

    /// Begins `GET path` and returns once the answer's head has come: status,
    /// worker and the length of the body, which [`Self::finish_body`] reads.
    pub async fn begin(&mut self, path: &str) -> Result<(Answer, usize)> {
        self.send("GET", path, &[], false).await?;
        self.read_head().await
    }

    /// Reads `length` bytes of body and throws them away.
    pub async fn finish_body(&mut self, length: usize) -> Result<()> {
        let mut buffer = vec![0; 64 << 10];
        let mut left = length;
        while left > 0 {
            let room = left.min(buffer.len());
            match self.stream.read(&mut buffer[..room]).await? {
                0 => bail!("the body ended {left} bytes early"),
                count => left -= count,
            }
        }
        Ok(())
    }

    async fn exchange(&mut self, method: &str, path: &str, body: &[u8], keep: bool) -> Result<Answer> {
        self.send(method, path, body, keep).await?;
        let (mut answer, length) = self.read_head().await?;
        answer.body.resize(length, 0);
        self.stream.read_exact(&mut answer.body).await.context("the body was cut off")?;
        Ok(answer)
    }

    async fn send(&mut self, method: &str, path: &str, body: &[u8], keep: bool) -> Result<()> {
        let target = self.target;
        let persistence = if keep { "keep-alive" } else { "close" };
        let length = body.len();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {target}\r\nConnection: {persistence}\r\nContent-Length: {length}\r\n\r\n"
        );
        self.stream.write_all(head.as_bytes()).await.context("cannot send the request")?;
        self.stream.write_all(body).await.context("cannot send the body")
    }

    async fn read_head(&mut self) -> Result<(Answer, usize)> {
        let status = self.read_line().await?;
        let status = status
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .with_context(|| format!("not an HTTP status line: {status:?}"))?;
        let mut answer = Answer { status, worker: None, body: Vec::new() };
        let mut length = 0;
        loop {
            let line = self.read_line().await?;
            let Some((name, value)) = line.split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => length = value.trim().parse().context("a bad Content-Length")?,
                "x-worker" => answer.worker = Some(value.trim().to_owned()),
                _ => {}
            }
        }
        Ok((answer, length))
    }

    async fn read_line(&mut self) -> Result<String> {
        let mut line = String::new();
        let count = self.stream.read_line(&mut line).await.context("cannot read the answer")?;
        anyhow::ensure!(count > 0, "closed before the answer");
        Ok(line.trim_end().to_owned())
    }
}
