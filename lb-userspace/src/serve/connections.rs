//! Serves HTTP/1 to clients that are not trusted: limits of concurrent connections, in all and per client, a part that is
//! reserved for privileged clients, and a limit of the time in which a connection must send a request.
//!
//! A client that is over its limit is told so (503) and disconnected, so that nobody can keep others out by opening
//! connections and leaving them idle. Connections that wait for an answer (streams, long polls) are not idle.

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    io,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// Limits of a listener.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Concurrent connections.
    pub all: usize,
    /// Part of them that only privileged clients may use.
    pub reserved: usize,
    /// Concurrent connections of one client that is not privileged.
    pub per_client: usize,
    /// Time in which a connection must have sent the headers of a request, the first or a further one.
    pub idle: Duration,
}

/// A connection as it was accepted.
pub struct Accepted<S, K> {
    /// The stream.
    pub stream: S,
    /// The client, to whom it is counted.
    pub client: K,
    /// Whether the client has no limit of its own, and may use what is reserved.
    pub is_privileged: bool,
}

/// A listening socket.
pub trait Door: Send + Sync {
    /// Its streams.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// What tells its clients apart.
    type Client: Clone + Eq + Hash + Send + 'static;
    /// Accepts a connection.
    fn accept(&self) -> impl Future<Output = io::Result<Accepted<Self::Stream, Self::Client>>> + Send;
}

/// Time for a refusal to be read.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);
/// Refusals are logged at most this often.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Pause after a failed accept: most likely this process is out of descriptors until connections close.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves the connections that come in by `door` until `stop` resolves; requests in progress are finished. `route` makes the
/// router of a connection, and `refusal` is the body of the answer to a client over its limit.
pub async fn serve<D: Door>(
    (name, limits): (&'static str, Limits),
    door: D,
    route: impl Fn(&D::Stream) -> Router + Clone + Send + 'static,
    refusal: String,
    stop: impl Future<Output = ()> + Send,
) {
    let counts = Arc::new(Mutex::new(HashMap::new()));
    let graceful = GracefulShutdown::new();
    let refusal: Arc<str> = refusal.into();
    let mut told: Option<Instant> = None;
    let mut stop = std::pin::pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = door.accept() => accepted,
        };
        let Accepted { stream, client, is_privileged } = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::error!(listener = name, %error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(permit) = ConnectionPermit::take(&counts, client, is_privileged, &limits) else {
            if told.is_none_or(|at| at.elapsed() > LOG_INTERVAL) {
                told = Some(Instant::now());
                tracing::warn!(
                    listener = name,
                    "a client has too many connections, or all are in use: refused"
                );
            }
            tokio::spawn(refuse(stream, refusal.clone()));
            continue;
        };
        let watcher = graceful.watcher();
        let route = route.clone();
        tokio::spawn(async move {
            let service = TowerToHyperService::new(route(&stream));
            let mut server = http1::Builder::new();
            let connection = server
                .timer(TokioTimer::new())
                .header_read_timeout(limits.idle)
                .serve_connection(TokioIo::new(stream), service);
            // A client that goes away, or is too slow, is no error of ours.
            let _ = watcher.watch(connection).await;
            drop(permit);
        });
    }
    graceful.shutdown().await;
}

async fn refuse<S: AsyncWrite + Unpin>(mut stream: S, body: Arc<str>) {
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    let send = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    // A client that does not read it learns it by the end of the connection.
    let _ = tokio::time::timeout(REFUSAL_TIMEOUT, send).await;
}

type Counts<K> = Arc<Mutex<HashMap<K, usize>>>;

/// A connection within the limits.
struct ConnectionPermit<K: Eq + Hash> {
    counts: Counts<K>,
    client: K,
}

impl<K: Clone + Eq + Hash> ConnectionPermit<K> {
    fn take(counts: &Counts<K>, client: K, is_privileged: bool, limits: &Limits) -> Option<Self> {
        let mut all = counts.lock().unwrap_or_else(PoisonError::into_inner);
        let in_use: usize = all.values().sum();
        let own = all.get(&client).copied().unwrap_or(0);
        let is_free = if is_privileged {
            in_use < limits.all
        } else {
            in_use < limits.all.saturating_sub(limits.reserved) && own < limits.per_client
        };
        if !is_free {
            return None;
        }
        all.insert(client.clone(), own + 1);
        Some(Self { counts: counts.clone(), client })
    }
}

impl<K: Eq + Hash> Drop for ConnectionPermit<K> {
    fn drop(&mut self) {
        let mut all = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::{io::AsyncReadExt, net::UnixStream, sync::mpsc, time};

    const LIMITS: Limits = Limits { all: 6, reserved: 2, per_client: 3, idle: Duration::from_millis(300) };

    /// A listener whose connections the test makes: uid 0 is privileged.
    struct Bed {
        connect: mpsc::Sender<Accepted<UnixStream, u32>>,
    }

    struct Made(tokio::sync::Mutex<mpsc::Receiver<Accepted<UnixStream, u32>>>);

    impl Door for Made {
        type Stream = UnixStream;
        type Client = u32;

        async fn accept(&self) -> io::Result<Accepted<UnixStream, u32>> {
            self.0.lock().await.recv().await.ok_or(io::ErrorKind::BrokenPipe.into())
        }
    }

    impl Bed {
        fn start() -> Self {
            let (connect, accepted) = mpsc::channel(1);
            let slow = async || {
                time::sleep(Duration::from_millis(900)).await;
                "slow\n"
            };
            let router = Router::new().route("/", get(async || "here\n")).route("/slow", get(slow));
            let route = move |_: &UnixStream| router.clone();
            let (door, full) = (Made(tokio::sync::Mutex::new(accepted)), "{\"full\":1}".to_owned());
            tokio::spawn(serve(("test", LIMITS), door, route, full, std::future::pending()));
            Self { connect }
        }

        async fn open(&self, client: u32) -> UnixStream {
            let (ours, stream) = UnixStream::pair().unwrap();
            let accepted = Accepted { stream, client, is_privileged: client == 0 };
            self.connect.send(accepted).await.unwrap();
            ours
        }
    }

    async fn ask(stream: &mut UnixStream, path: &str) -> String {
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        // A connection that was refused may be closed already; its answer is there to read.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut answer = vec![0; 1_024];
        let len = stream.read(&mut answer).await.unwrap_or(0);
        String::from_utf8_lossy(&answer[..len]).into_owned()
    }

    #[tokio::test]
    async fn nobody_keeps_others_out() {
        let bed = Bed::start();
        let mut idle = Vec::new();
        for _ in 0..3 {
            idle.push(bed.open(7).await);
        }
        let refused = ask(&mut bed.open(7).await, "/").await;
        assert!(refused.starts_with("HTTP/1.1 503") && refused.ends_with("{\"full\":1}"), "{refused}");
        let mut other = bed.open(8).await;
        assert!(ask(&mut other, "/").await.ends_with("here\n"), "another client has its own limit");
        let refused = ask(&mut bed.open(9).await, "/").await;
        assert!(refused.starts_with("HTTP/1.1 503"), "the rest is reserved: {refused}");
        let mut root = bed.open(0).await;
        assert!(ask(&mut root, "/").await.ends_with("here\n"), "for this one");
        drop(idle);
        for _ in 0..100 {
            if ask(&mut bed.open(7).await, "/").await.ends_with("here\n") {
                return;
            }
            time::sleep(Duration::from_millis(20)).await;
        }
        panic!("closed connections are still counted");
    }

    #[tokio::test]
    async fn idle_connections_are_closed_and_waiting_ones_are_not() {
        let bed = Bed::start();
        let mut silent = bed.open(1).await;
        let mut kept = bed.open(1).await;
        assert!(ask(&mut kept, "/").await.ends_with("here\n"));
        let mut waiting = bed.open(1).await;
        assert!(ask(&mut waiting, "/slow").await.ends_with("slow\n"), "an answer may take longer");
        let mut rest = Vec::new();
        for stream in [&mut silent, &mut kept] {
            let closed = time::timeout(Duration::from_secs(10), stream.read_to_end(&mut rest)).await;
            closed.expect("closed in time").unwrap();
        }
    }
}
