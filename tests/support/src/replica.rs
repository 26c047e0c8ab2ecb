//! A worker process that serves requests and reports its replica state as it is told to: well, badly, or not at
//! all. It is this very test program, started again, so that killing it is killing a process.
//!
//! Told `auto-SLOTS-MILLISECONDS`, it computes so many requests at once, each for so long, and reports what is so.
//!
//! In: `/say/WORDS` on any connection sets what `GET /replica` reports from then on. Out: `GET /` answers with the
//! worker's name, or with status 503 if told [`FAILING`]. A test binary that uses it has one ignored test that calls [`serve`].

use std::{
    net::{Ipv6Addr, SocketAddr},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

use crate::{
    bed::{Bed, Worker, vip_v4},
    check::block_on,
    http::Connection,
    process::Process,
    stage::Stage,
};

/// The port that it serves and reports on.
pub const PORT: u16 = 8000;
/// Word with which its health endpoint answers 503.
pub const FAILING: &str = "failing";
/// Names the worker to the program that is to be one.
const NAME: &str = "LB_REPLICA_WORKER";
/// How often it reports without a change.
const HEARTBEAT: Duration = Duration::from_millis(200);
/// Shortest time between two reports.
const REST: Duration = Duration::from_millis(5);

/// Slots and time of `auto-SLOTS-MILLISECONDS`.
fn auto(words: &str) -> Option<(u64, Duration)> {
    let (slots, time) = words.strip_prefix("auto-")?.split_once('-')?;
    Some((slots.parse().ok()?, Duration::from_millis(time.parse().ok()?)))
}

/// What the worker does with requests, and how many there are.
#[derive(Default)]
struct Work {
    /// How many it computes at once, and for how long each.
    told: watch::Sender<(u64, Duration)>,
    /// Being computed, and waiting to be.
    counts: watch::Sender<(u64, u64)>,
    finished: AtomicU64,
}

impl Work {
    /// The report that is true.
    fn body(&self) -> String {
        let ((slots, _), (running, waiting)) = (*self.told.borrow(), *self.counts.borrow());
        let finished = self.finished.load(Ordering::Relaxed);
        format!(
            r#"{{"protocol":1,"phase":"ready","model":"fake","version":"1","running":{running},"waiting":{waiting},"capacity":{{"running":{slots}}},"answers":{{"finished":{finished},"failed":0,"first_token_ms":0,"first_tokens":{finished}}}}}"#
        )
    }

    /// Waits for a place, and takes it for the time that a request takes. Whoever leaves meanwhile gives it back.
    async fn serve(&self) {
        struct Leaves<'w>(&'w Work, bool);
        impl Drop for Leaves<'_> {
            fn drop(&mut self) {
                self.0.counts.send_modify(|c| if self.1 { c.0 -= 1 } else { c.1 -= 1 });
            }
        }
        self.counts.send_modify(|c| c.1 += 1);
        let mut place = Leaves(self, false);
        let mut counts = self.counts.subscribe();
        let mut told = self.told.subscribe();
        loop {
            let (slots, time) = *told.borrow_and_update();
            counts.borrow_and_update();
            let took = self.counts.send_if_modified(|c| {
                let is_free = c.0 < slots;
                if is_free {
                    *c = (c.0 + 1, c.1 - 1);
                }
                is_free
            });
            if took {
                place.1 = true;
                tokio::time::sleep(time).await;
                self.finished.fetch_add(1, Ordering::Relaxed);
                return;
            }
            tokio::select! { _ = counts.changed() => {}, _ = told.changed() => {} }
        }
    }
}

/// Starts the worker on a worker host. `test` is the ignored test that calls [`serve`].
pub fn start(bed: &Bed, worker: &Worker, test: &str) -> Result<Process> {
    let program = std::env::current_exe().context("cannot find the running program")?;
    let mut command: Command = worker.namespace.command(program);
    command.args([test, "--exact", "--ignored", "--nocapture"]).env(NAME, &worker.name);
    let name = format!("replica {}", worker.name);
    let mut process = Process::spawn(&name, command, &bed.path(&format!("replica-{}.log", worker.name)))?;
    let address = SocketAddr::from(([127, 0, 0, 1], PORT));
    process.wait_ready(&format!("{name} listens"), Duration::from_secs(10), || {
        worker.namespace.enter(move || std::net::TcpStream::connect(address).is_ok()).unwrap_or(false)
    })?;
    Ok(process)
}

/// Starts one on each worker of a bed.
pub fn start_all(bed: &Bed, test: &str) -> Result<Vec<Option<Process>>> {
    bed.workers.iter().map(|worker| start(bed, worker, test).map(Some)).collect()
}

/// Adds the service `llm`, which asks its backends for their state; `settings` are further flags.
pub fn add_service(stage: &Stage, settings: &[&str]) -> Result<()> {
    let vip = format!("{}:{PORT}/tcp", vip_v4(1));
    let service =
        ["service", "add", "llm", "--vip", &vip, "--replica", "stream", "--replica-interval", "300ms"];
    stage.lbctl.run(&[&service[..], settings].concat()).map(drop)
}

/// Tells a worker what to report from now on, for [`body`].
pub fn say(worker: &Worker, words: &str) -> Result<()> {
    let path = format!("/say/{words}");
    let answer = block_on(&worker.namespace, move || async move {
        Connection::open(SocketAddr::from(([127, 0, 0, 1], PORT))).await?.get(&path, false).await
    })?;
    ensure!(answer.status == 200, "{} does not obey: status {}", worker.name, answer.status);
    Ok(())
}

/// What is reported for some words: `PHASE-RUNNING-WAITING-VERSION-FINISHED-FAILED-MILLISECONDS`, of which all but the
/// first may be left out from the end, or the name of a lie.
fn body(words: &str) -> String {
    match words {
        "negative" => r#"{"phase":"ready","running":-5,"waiting":0}"#.to_owned(),
        "huge" => r#"{"phase":"ready","running":1e18,"waiting":0}"#.to_owned(),
        "nan" => r#"{"phase":"ready","running":NaN,"waiting":0}"#.to_owned(),
        "stale" => r#"{"phase":"ready","running":0,"waiting":0,"time_ms":1000}"#.to_owned(),
        "megabytes" => format!(r#"{{"phase":"failed","junk":"{}"}}"#, "x".repeat(10 << 20)),
        other => {
            let mut parts = other.split('-');
            let phase = parts.next().unwrap_or("ready");
            let (running, waiting) = (parts.next().unwrap_or("0"), parts.next().unwrap_or("0"));
            let version = parts.next().unwrap_or("1");
            let answers = parts.next().map_or_else(String::new, |finished| {
                let (failed, ms) = (parts.next().unwrap_or("0"), parts.next().unwrap_or("0"));
                format!(
                    r#","answers":{{"finished":{finished},"failed":{failed},"first_token_ms":{ms},"first_tokens":{finished}}}"#
                )
            });
            format!(
                r#"{{"protocol":1,"phase":"{phase}","model":"fake","version":"{version}","running":{running},"waiting":{waiting},"capacity":{{"running":8}}{answers}}}"#
            )
        }
    }
}

/// Is the worker until it is killed, if this process was started as one; otherwise returns at once.
pub fn serve() -> Result<()> {
    let Ok(name) = std::env::var(NAME) else { return Ok(()) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
        socket.set_only_v6(false)?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)).into())?;
        socket.listen(4096)?;
        let listener = TcpListener::from_std(socket.into())?;
        let said: &'static watch::Sender<String> =
            Box::leak(Box::new(watch::Sender::new("ready".to_owned())));
        let name: &'static str = name.leak();
        let work: &'static Work = Box::leak(Box::default());
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(async move { drop(answer(stream, name, said, work).await) });
        }
    })
}

async fn answer(
    mut stream: TcpStream,
    name: &str,
    said: &watch::Sender<String>,
    work: &Work,
) -> std::io::Result<()> {
    let mut request = vec![0; 4096];
    let mut length = 0;
    while length < request.len() && !request[..length].windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut request[length..]).await? {
            0 => return Ok(()),
            count => length += count,
        }
    }
    let request = String::from_utf8_lossy(&request[..length]).into_owned();
    let path = request.split(' ').nth(1).unwrap_or("/");
    let with_status = |status: &str, body: &str| {
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nX-Worker: {name}\r\nConnection: close\r\n\r\n{body}"
        )
    };
    let whole = |body: &str| with_status("200 OK", body);
    if let Some(words) = path.strip_prefix("/say/") {
        if let Some(told) = auto(words) {
            work.told.send_replace(told);
        }
        said.send_replace(words.to_owned());
        return stream.write_all(whole("ok").as_bytes()).await;
    }
    let works = auto(&said.borrow()).is_some();
    if path != "/replica" {
        if works && path == "/" {
            work.serve().await;
        }
        let status = if *said.borrow() == FAILING { "503 Service Unavailable" } else { "200 OK" };
        return stream.write_all(with_status(status, name).as_bytes()).await;
    }
    let (mut said, mut counts) = (said.subscribe(), work.counts.subscribe());
    let body = |words: &str| if auto(words).is_some() { work.body() } else { body(words) };
    if !request.to_ascii_lowercase().contains("text/event-stream") {
        let words = said.borrow_and_update().clone();
        return stream.write_all(whole(&body(&words)).as_bytes()).await;
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n").await?;
    loop {
        let words = said.borrow_and_update().clone();
        if words == "trickle" {
            // A report that never ends, a byte at a time.
            stream.write_all(b"d").await?;
        } else if words != "silent" {
            stream.write_all(format!("event: replica\ndata: {}\n\n", body(&words)).as_bytes()).await?;
        }
        tokio::time::sleep(REST).await;
        counts.borrow_and_update();
        let news = async {
            tokio::select! { _ = said.changed() => {}, _ = counts.changed(), if auto(&words).is_some() => {} }
        };
        let _ = tokio::time::timeout(HEARTBEAT, news).await;
    }
}
