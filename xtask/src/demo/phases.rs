//! The demo's phases: what happens while the clients are running.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::Signal;
use test_support::{http::Connection, nginx, stage::Stage, wait};

use super::{report::Report, traffic::Traffic};

/// Minimum time that a phase observes the clients.
const WATCH: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(15);

/// Runs all phases on a stage that has just been set up.
pub fn run_all(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let mut traffic = Traffic::start(stage)?;
    baseline(&mut traffic, report)?;
    add(stage, &mut traffic, report)?;
    drain(stage, &mut traffic, report)?;
    kill(stage, &mut traffic, report)?;
    restart(stage, &mut traffic, report, Signal::SIGTERM)?;
    restart(stage, &mut traffic, report, Signal::SIGKILL)
}

fn baseline(traffic: &mut Traffic, report: &mut Report) -> Result<()> {
    let ((), seen) = traffic.watch(watch)?;
    report.add(seen.phase("baseline", None));
    Ok(())
}

fn add(stage: &mut Stage, traffic: &mut Traffic, report: &mut Report) -> Result<()> {
    let index = stage.add_host()?;
    let name = stage.bed.workers[index].name.clone();
    let (took, seen) = traffic.watch(|| {
        stage.change_backend("add", index)?;
        let took = stage.wait_health(index, true)?;
        watch()?;
        Ok(took)
    })?;
    let mut phase = seen.phase(&format!("add {name}"), None);
    let address = stage.backend_address(index, false);
    phase
        .notes
        .push(format!("`lbctl backend add web {name} {address}`: in use after {} ms", took.as_millis()));
    ensure!(phase.by_worker.contains_key(&name), "{name} was added but received no request");
    report.add(phase);
    Ok(())
}

/// Drains a worker during a download of several seconds, which must complete.
fn drain(stage: &Stage, traffic: &mut Traffic, report: &mut Report) -> Result<()> {
    let target = stage.targets(nginx::PORT)[0];
    let newest = stage.bed.workers.last().context("there is a worker")?.name.clone();
    let (sender, receiver) = std::sync::mpsc::channel();
    let download = stage.bed.client.spawn_async(move || async move {
        // From a worker that also has kept connections, which the newest one does not.
        let begin = async {
            loop {
                let mut connection = Connection::open(target).await?;
                let (answer, length) = connection.begin("/download/1").await?;
                let worker = answer.worker.context("the response has no X-Worker header")?;
                if worker != newest {
                    return Ok::<_, anyhow::Error>((connection, worker, length));
                }
            }
        };
        let (mut connection, worker, length) = begin.await?;
        let _ = sender.send(worker);
        connection.finish_body(length).await?;
        Ok::<_, anyhow::Error>(length)
    })?;
    let name = receiver.recv_timeout(PATIENCE).context("the download did not begin")?;
    let index = position(stage, &name)?;
    let ((in_flight, drained), seen) = traffic.watch(|| {
        stage.change_backend("drain", index)?;
        let drained = Instant::now();
        let in_flight = !download.is_finished();
        wait::until("the download ends", PATIENCE, || download.is_finished())?;
        Ok((in_flight, drained))
    })?;
    let length = download.join().map_err(|_| anyhow!("the download panicked"))??;
    ensure!(in_flight, "the download ended before the drain began");

    let mut phase = seen.phase(&format!("drain {name}"), None);
    let late = seen.fresh.requests.iter().filter(|request| {
        request.started > drained && request.worker.as_ref().is_some_and(|worker| *worker == name)
    });
    let late = late.count();
    let kept = seen.kept.requests.iter().filter(|request| request.worker.as_ref() == Some(&name)).count();
    phase
        .notes
        .push(format!("`lbctl backend drain web {name}`: its open download completed ({length} bytes)"));
    phase.notes.push(format!("{late} new connections reached it, {kept} requests on its open connections"));
    phase.failed += late;
    report.add(phase);
    stage.change_backend("undrain", index)
}

fn kill(stage: &mut Stage, traffic: &mut Traffic, report: &mut Report) -> Result<()> {
    let index = 1;
    let name = stage.bed.workers[index].name.clone();
    let (detected, seen) = traffic.watch(|| {
        // Dropping the guard sends SIGKILL.
        stage.hosts[index].http = None;
        let detected = stage.wait_health(index, false)?;
        watch()?;
        Ok(detected)
    })?;
    let mut phase = seen.phase(&format!("kill {name}"), Some(&name));
    phase.detect_ms = Some(u64::try_from(detected.as_millis()).unwrap_or(u64::MAX));
    phase.notes.push(format!(
        "failure detected after {} ms; {} connections were open to it",
        detected.as_millis(),
        phase.failed_open_to_killed
    ));
    report.add(phase);

    stage.revive(index)?;
    let (took, seen) = traffic.watch(|| {
        let took = stage.wait_health(index, true)?;
        watch()?;
        Ok(took)
    })?;
    let mut phase = seen.phase(&format!("{name} returns"), None);
    phase.notes.push(format!("in use again after {} ms", took.as_millis()));
    report.add(phase);
    Ok(())
}

fn restart(stage: &mut Stage, traffic: &mut Traffic, report: &mut Report, signal: Signal) -> Result<()> {
    let name = match signal {
        Signal::SIGKILL => "lbd: kill -9, restart",
        _ => "lbd: stop, restart",
    };
    let ((away, took), seen) = traffic.watch(|| {
        let stopped = Instant::now();
        stage.ingress.stop(signal)?;
        watch()?;
        let away = stopped.elapsed();
        let starting = Instant::now();
        stage.ingress.start_again(&stage.bed)?;
        let took = starting.elapsed();
        watch()?;
        Ok((away, took))
    })?;
    let mut phase = seen.phase(name, None);
    phase.notes.push(format!(
        "lbd was stopped for {:.1} s while the kernel forwarded, and started in {} ms",
        away.as_secs_f32(),
        took.as_millis()
    ));
    report.add(phase);
    Ok(())
}

/// Lets the clients run for a while.
fn watch() -> Result<()> {
    thread::sleep(WATCH);
    Ok(())
}

/// Returns the index of the worker called `name`.
pub fn position(stage: &Stage, name: &str) -> Result<usize> {
    let position = stage.bed.workers.iter().position(|worker| worker.name == name);
    position.with_context(|| format!("no worker is called {name:?}"))
}
