//! Long-lived connections: a worker that answers each line with its name, and a
//! client that holds many connections open and asks on each who is there.

use std::{
    net::{Ipv6Addr, SocketAddr},
    sync::mpsc,
    thread::JoinHandle,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    sync::{mpsc as channel, oneshot},
    task::JoinSet,
    time::timeout,
};

use crate::netns::Namespace;

/// How long one exchange of lines may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A worker's line service on every address of its host. Dropping it closes the
/// port and every connection.
#[derive(Debug)]
pub struct LineWorker {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl LineWorker {
    /// Starts the service `name` on `port`; returns once it listens.
    pub fn start(namespace: &Namespace, name: &str, port: u16) -> Result<Self> {
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let name = name.to_owned();
        let thread = namespace.spawn_async(move || async move {
            let listener = listen(port);
            let listening = listener.as_ref().map(drop).map_err(|error| anyhow!("{error:#}"));
            let _ = ready.send(listening);
            if let Ok(listener) = listener {
                // The tasks live in `answer_all` and end with it.
                tokio::select! { () = answer_all(listener, name) => {}, _ = stopped => {} }
            }
        })?;
        is_ready.recv().context("the line worker died")??;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for LineWorker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(port: u16) -> Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(4096)?;
    Ok(TcpListener::from_std(socket.into())?)
}

async fn answer_all(listener: TcpListener, name: String) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    connections.spawn(answer(stream, name.clone()));
                }
            }
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn answer(stream: TcpStream, name: String) {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    while let Ok(1..) = stream.read_line(&mut line).await {
        line.clear();
        if stream.write_all(format!("{name}\n").as_bytes()).await.is_err() {
            return;
        }
    }
}

/// One held connection as the last exchange found it.
#[derive(Clone, Debug)]
pub struct Held {
    /// The client's side.
    pub local: SocketAddr,
    /// The VIP.
    pub target: SocketAddr,
    /// Who answered the first line.
    pub worker: String,
    /// Who answers now, or what broke.
    pub now: Result<String, String>,
}

impl Held {
    /// Whether the worker that took the connection still answers on it.
    pub fn stays(&self) -> bool {
        self.now.as_ref().is_ok_and(|now| *now == self.worker)
    }
}

/// Connections that stay open until this is dropped.
#[derive(Debug)]
pub struct Holder {
    ask: channel::UnboundedSender<oneshot::Sender<Vec<Held>>>,
    _thread: JoinHandle<()>,
}

impl Holder {
    /// Opens `count` connections to `targets` in turn, each with a first
    /// exchange. Fails when a single one fails.
    pub fn open(namespace: &Namespace, targets: &[SocketAddr], count: usize) -> Result<Self> {
        let (ask, mut asked) = channel::unbounded_channel::<oneshot::Sender<Vec<Held>>>();
        let (ready, is_ready) = mpsc::sync_channel(1);
        let targets = targets.to_owned();
        let thread = namespace.spawn_async(move || async move {
            let mut lines = match open_all(&targets, count).await {
                Ok(lines) => lines,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(()));
            while let Some(reply) = asked.recv().await {
                lines = exchange_all(lines).await;
                let _ = reply.send(lines.iter().map(|line| line.held.clone()).collect());
            }
        })?;
        is_ready.recv().context("the connection holder died")??;
        Ok(Self { ask, _thread: thread })
    }

    /// Exchanges a line on every connection.
    pub fn exchange(&self) -> Result<Vec<Held>> {
        let (reply, replied) = oneshot::channel();
        self.ask.send(reply).map_err(|_| anyhow!("the connection holder is gone"))?;
        replied.blocking_recv().context("the connection holder died")
    }
}

struct Line {
    stream: BufReader<TcpStream>,
    held: Held,
}

async fn open_all(targets: &[SocketAddr], count: usize) -> Result<Vec<Line>> {
    let mut opening = JoinSet::new();
    let mut lines = Vec::with_capacity(count);
    for number in 0..count {
        if opening.len() >= 64 {
            lines.push(opening.join_next().await.context("nothing is being opened")???);
        }
        opening.spawn(open(targets[number % targets.len()]));
    }
    while let Some(opened) = opening.join_next().await {
        lines.push(opened??);
    }
    Ok(lines)
}

async fn open(target: SocketAddr) -> Result<Line> {
    let stream = timeout(PATIENCE, TcpStream::connect(target))
        .await
        .with_context(|| format!("no connection to {target} within {PATIENCE:?}"))?
        .with_context(|| format!("cannot connect to {target}"))?;
    stream.set_nodelay(true)?;
    let local = stream.local_addr()?;
    let mut stream = BufReader::new(stream);
    let worker = exchange(&mut stream).await.map_err(|error| anyhow!("{local} to {target}: {error}"))?;
    let held = Held { local, target, now: Ok(worker.clone()), worker };
    Ok(Line { stream, held })
}

async fn exchange_all(lines: Vec<Line>) -> Vec<Line> {
    let mut asking = JoinSet::new();
    for mut line in lines {
        asking.spawn(async move {
            if line.held.now.is_ok() {
                line.held.now = exchange(&mut line.stream).await;
            }
            line
        });
    }
    asking.join_all().await
}

async fn exchange(stream: &mut BufReader<TcpStream>) -> Result<String, String> {
    let ask = async {
        stream.write_all(b"who\n").await.map_err(|error| error.to_string())?;
        let mut line = String::new();
        match stream.read_line(&mut line).await {
            Ok(0) => Err("closed".to_owned()),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => Err(error.to_string()),
        }
    };
    timeout(PATIENCE, ask).await.unwrap_or_else(|_| Err(format!("no answer within {PATIENCE:?}")))
}
