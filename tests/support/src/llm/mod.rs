//! Real LLM workers behind the VIP, and clients that account for every
//! completion: who served it, its first token, its tokens, what went wrong.
//!
//! In: the built `inference-worker` and a model file, from the demo's set-up or
//! (in tests) from `LB_INFERENCE_WORKER` and `LB_INFERENCE_MODEL`.

use std::{
    collections::{BTreeMap, HashSet},
    env,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;

pub use client::{Account, Ask, Completion, Load, Running, complete};

use crate::{
    bed::{Bed, Worker, vip_v4, vip_v6},
    check::block_on,
    http::Connection,
    process::Process,
    stage::Stage,
    wait,
};

mod client;

/// The port of the service and of the workers.
pub const PORT: u16 = 8000;
/// What the workers call the model.
pub const MODEL: &str = "smol";
/// The service of each family.
pub const SERVICES: [&str; 2] = ["llm", "llm6"];
/// How long a worker may take to load its model, and lbd to see it.
const LOADING: Duration = Duration::from_secs(120);

/// What runs on a worker host.
#[derive(Clone, Debug)]
pub struct Program {
    /// The `inference-worker` binary.
    pub worker: PathBuf,
    /// A model file or folder.
    pub model: PathBuf,
}

impl Program {
    /// As `cargo xtask test inference` names them to the tests.
    pub fn from_env() -> Result<Self> {
        let path = |name: &str| {
            env::var_os(name)
                .map(PathBuf::from)
                .with_context(|| format!("{name} is not set: run this by `cargo xtask test inference`"))
        };
        Ok(Self { worker: path("LB_INFERENCE_WORKER")?, model: path("LB_INFERENCE_MODEL")? })
    }

    /// Starts a worker on a worker host. It listens soon, and is ready only when
    /// `/ready` says so.
    pub fn start(&self, bed: &Bed, worker: &Worker) -> Result<Process> {
        let mut command = worker.namespace.command(&self.worker);
        command.arg("--model").arg(format!("{MODEL}={}", self.model.display()));
        command.args(["--name", &worker.name, "--listen", &format!("[::]:{PORT}")]);
        // Several share this machine: one compute thread each, and a cache for some dozen requests.
        command.args(["--threads", "1", "--kv-cache-mib", "192"]);
        let name = format!("inference-worker {}", worker.name);
        Process::spawn(&name, command, &bed.path(&format!("llm-{}.log", worker.name)))
    }
}

/// The status of `GET /ready` on the worker itself; None when it does not answer.
pub fn ready(worker: &Worker) -> Option<u16> {
    let ask = || async {
        let mut connection = Connection::open((Ipv4Addr::LOCALHOST, PORT).into()).await?;
        Ok(connection.get("/ready", false).await?.status)
    };
    block_on(&worker.namespace, ask).ok()
}

/// Makes the service of both families, health-checked by `/ready`, with the
/// workers of `backends` behind it.
pub fn add_services(stage: &Stage, backends: &[usize]) -> Result<()> {
    for (service, vip) in SERVICES.iter().zip(targets()) {
        let vip = format!("{vip}/tcp");
        let place = ["service", "add", service, "--vip", &vip, "--mode", stage.plan.mode];
        // The timeout is for workers that share two cores; a dead one is refused at once.
        let health = ["--health", "http:/ready", "--health-interval", "200ms", "--health-timeout", "4s"];
        let verdict = ["--rise", "2", "--fall", "2"];
        stage.lbctl.run(&[&place[..], &health, &verdict].concat())?;
        backends.iter().try_for_each(|&index| stage.change_backend_of(service, "add", index))?;
    }
    Ok(())
}

/// `lbctl backend VERB` in both services.
pub fn change_backend(stage: &Stage, verb: &str, index: usize) -> Result<()> {
    SERVICES.iter().try_for_each(|service| stage.change_backend_of(service, verb, index))
}

/// The service's address of both families.
pub fn targets() -> Vec<SocketAddr> {
    vec![(vip_v4(1), PORT).into(), (vip_v6(1), PORT).into()]
}

/// Whether lbd finds worker `index` healthy in both services and gives it new
/// flows (`Some(true)`), in neither (`Some(false)`), or is in between.
pub fn in_use(stage: &Stage, index: usize) -> Option<bool> {
    let backends = stage.lbctl.backends(&stage.bed.workers[index].name).ok()?;
    let mut ours = backends.iter().filter(|backend| SERVICES.contains(&backend.service.as_str()));
    let first = ours.next()?;
    let is_used = first.is_healthy && first.slots > 0;
    ours.all(|backend| (backend.is_healthy && backend.slots > 0) == is_used).then_some(is_used)
}

/// Waits until lbd gives worker `index` new flows, or none.
pub fn wait_in_use(stage: &Stage, index: usize, wanted: bool) -> Result<Duration> {
    let what =
        format!("{} {} new flows", stage.bed.workers[index].name, if wanted { "gets" } else { "gets no" });
    wait::until(&what, LOADING, || in_use(stage, index) == Some(wanted))
        .with_context(|| format!("lbd said:\n{}", stage.ingress.process().output()))
}

/// Starts workers behind services that are there already, and waits until lbd
/// uses all of them. Fails when lbd used one before its `/ready` was 200. Says
/// for how many looks a worker listened without being ready.
pub fn start_workers(
    stage: &Stage,
    program: &Program,
    backends: &[usize],
) -> Result<(BTreeMap<usize, Process>, usize)> {
    let mut started = BTreeMap::new();
    for &index in backends {
        ensure!(
            in_use(stage, index) == Some(false),
            "{} is in use before it runs",
            stage.bed.workers[index].name
        );
        started.insert(index, program.start(&stage.bed, &stage.bed.workers[index])?);
    }
    let (mut waiting, mut unready) = (backends.to_vec(), 0);
    let mut wrong = None;
    let what = "every LLM worker is ready and in use";
    wait::until(what, LOADING, || {
        waiting.retain(|&index| {
            // In this order: what lbd says now must have been true of the worker before.
            let is_used = in_use(stage, index) == Some(true);
            let status = ready(&stage.bed.workers[index]);
            unready += usize::from(status == Some(503));
            if is_used && status != Some(200) {
                wrong =
                    Some(format!("{} is in use and /ready says {status:?}", stage.bed.workers[index].name));
            }
            !is_used
        });
        let died = started.values_mut().find_map(|process| process.ended().map(|_| process.output()));
        wrong = wrong.take().or(died);
        waiting.is_empty() || wrong.is_some()
    })?;
    match wrong {
        Some(wrong) => Err(anyhow!("an LLM worker did not start well: {wrong}")),
        None => Ok((started, unready)),
    }
}

/// Kills (-9) a worker that streams, and returns the client's ends of the
/// connections that were open to it: all of them when none begins meanwhile
/// ([`Running::hold`]).
pub fn kill(worker: &Worker, process: Process) -> Result<HashSet<SocketAddr>> {
    // Stopped, it can neither end a stream nor begin one while they are listed.
    process.signal(Signal::SIGSTOP)?;
    let open = open_connections(worker)?;
    // Dropping the guard is kill -9.
    drop(process);
    Ok(open)
}

/// The client's ends of the connections that are open to the worker now,
/// accepted by the process or not yet.
fn open_connections(worker: &Worker) -> Result<HashSet<SocketAddr>> {
    let text = worker.namespace.run("ss", &["-tnH", "state", "established"])?;
    let mut found = HashSet::new();
    for line in text.lines() {
        // Receive queue, send queue, local, peer.
        let mut columns = line.split_whitespace().skip(2);
        let (Some(local), Some(peer)) = (columns.next(), columns.next()) else { continue };
        if local.ends_with(&format!(":{PORT}")) {
            let peer: SocketAddr = peer.parse().with_context(|| format!("ss printed {line:?}"))?;
            found.insert(SocketAddr::new(peer.ip().to_canonical(), peer.port()));
        }
    }
    Ok(found)
}
