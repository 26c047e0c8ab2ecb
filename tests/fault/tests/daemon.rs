//! lbd dies at bad moments, is started wrongly, or finds its files broken. The
//! packet path must not notice, and the message must name the thing.

use std::{
    fs::{self, File},
    io::Write,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lb_common::ABI_VERSION;
use nix::sys::signal::Signal;
use serde_json::Value;
use test_support::{
    bed::{Layout, binary},
    check::{ensure_none_failed, request},
    hold::Holder,
    http::{Account, Load, Running},
    nginx,
    stage::{LINES, Plan, Stage},
};

/// Starts a second `lbd ingress` that is expected to end by itself.
fn start_expecting_refusal(stage: &Stage, arguments: &[String]) -> Result<Output> {
    let mut command: Command = stage.bed.ingress.command("timeout");
    command.args(["10"]).arg(binary("lbd")?).args(arguments);
    command.output().context("cannot start lbd")
}

/// The daemon refused, said so in terms of `name`, and traffic goes on.
fn ensure_refused(stage: &Stage, output: &Output, name: &str) -> Result<()> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code().is_some_and(|code| ![0, 124].contains(&code)), "{}: {said}", output.status);
    ensure!(said.contains(name), "the message does not name {name}: {said}");
    ensure!(!said.contains("panicked"), "{said}");
    ensure_none_failed(&request(stage, stage.targets(nginx::PORT), 200)?)
}

#[test]
fn kill_9_in_the_middle_of_changes_leaves_a_whole_state() -> Result<()> {
    let layout = Layout { workers: 4, ..Layout::default() };
    let mut stage = Stage::start(Plan { layout, backends: Some(3), ..Plan::default() })?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), 300)?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;

    let files: Vec<_> = [vec![0, 1, 2], vec![0, 1, 2, 3]]
        .iter()
        .enumerate()
        .map(|(number, backends)| {
            let path = stage.bed.path(&format!("change-{number}.toml"));
            fs::write(&path, stage.configuration(backends)).map(|()| path)
        })
        .collect::<std::io::Result<_>>()?;
    let mut wholes = Vec::new();
    for path in &files {
        stage.lbctl.run(&["config", "apply", &path.display().to_string()])?;
        wholes.push(stage.lbctl.run(&["config", "export"])?);
    }

    let mut events = Vec::new();
    for round in 0..16_u64 {
        let mut note = |what: &str| events.push((Instant::now(), format!("round {round}: {what}")));
        let lbctl = stage.lbctl.clone();
        let path = files[usize::try_from(round % 2)?].display().to_string();
        let change = thread::spawn(move || lbctl.output(&["config", "apply", &path]));
        // From before the change to well after it.
        note("change begins");
        thread::sleep(Duration::from_millis(round * 5));
        stage.ingress.stop(Signal::SIGKILL)?;
        note("lbd is dead");
        let answered = change.join().is_ok_and(|output| output.is_ok_and(|output| output.status.success()));
        stage.ingress.start_again(&stage.bed)?;
        note(if answered { "lbd is back; the change was answered" } else { "lbd is back" });
        let state = stage.lbctl.run(&["config", "export"])?;
        ensure!(wholes.contains(&state), "round {round} left half a change:\n{state}");
        let moved: Vec<_> = holder.exchange()?.into_iter().filter(|held| !held.stays()).collect();
        if let Some(first) = moved.first() {
            let flow = [first.local.to_string(), first.target.to_string()];
            let why = stage.lbctl.run(&["explain", &flow[0], &flow[1], "tcp"])?;
            let told = why + &tell(&stage, &events, &load.take())?;
            bail!("round {round}: {} of 300 connections moved: {first:?}\n{told}", moved.len());
        }
    }

    let account = load.finish()?;
    if account.failed() > 0 {
        bail!("{} requests failed\n{}", account.failed(), tell(&stage, &events, &account)?);
    }
    Ok(())
}

/// What happened when, for the one who has to find out why.
fn tell(stage: &Stage, events: &[(Instant, String)], account: &Account) -> Result<String> {
    let since = |when: Instant| when.saturating_duration_since(events[0].0).as_secs_f32();
    let mut lines: Vec<(f32, String)> =
        events.iter().map(|(when, what)| (since(*when), what.clone())).collect();
    for failure in account.failures() {
        lines.push((since(failure.started), format!("a request begins that fails: {failure:?}")));
    }
    lines.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut text: String = lines.iter().map(|(when, what)| format!("{when:.3} s: {what}\n")).collect();
    text.push_str(&stage.lbctl.run(&["stats"])?);
    text.push_str(&stage.ingress.process().output());
    Ok(text)
}

/// Arguments of a daemon on `interface` that shares nothing with the stage's.
fn arguments_of_a_stranger(stage: &Stage, interface: &str) -> Vec<String> {
    let mut arguments = stage.ingress.arguments().to_vec();
    for (flag, value) in [
        ("--iface", interface.to_owned()),
        ("--pin-path", stage.bed.pin_path("stranger").display().to_string()),
        ("--state-dir", stage.bed.path("stranger").display().to_string()),
        ("--socket", stage.bed.path("stranger.sock").display().to_string()),
    ] {
        let at = arguments.iter().position(|argument| argument == flag).expect("the stage gives every flag");
        arguments[at + 1] = value;
    }
    arguments
}

#[test]
fn a_second_daemon_on_the_interface_is_refused() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    let output = start_expecting_refusal(&stage, &arguments_of_a_stranger(&stage, "eth0"))?;
    ensure_refused(&stage, &output, "eth0")
}

#[test]
fn a_second_daemon_on_the_same_pins_is_refused() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    let output = start_expecting_refusal(&stage, stage.ingress.arguments())?;
    ensure_refused(&stage, &output, "lbd")
}

#[test]
fn an_interface_that_does_not_exist_is_named_and_waited_for() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    let output = start_expecting_refusal(&stage, &arguments_of_a_stranger(&stage, "nosuch0"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(124), "it did not stay: {} {said}", output.status);
    ensure!(said.contains("interface nosuch0 does not exist; this host has: eth0"), "{said}");
    Ok(())
}

#[test]
fn an_interface_without_driver_support_needs_a_flag() -> Result<()> {
    let stage = Stage::start(Plan::default())?;
    stage.bed.ingress.ip(&["link", "add", "br0", "type", "bridge"])?;
    stage.bed.ingress.ip(&["link", "set", "br0", "up"])?;
    let mut arguments = arguments_of_a_stranger(&stage, "br0");
    let output = start_expecting_refusal(&stage, &arguments)?;
    ensure_refused(&stage, &output, "br0")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(said.contains("--allow-generic"), "the message does not name the fix: {said}");

    arguments.push("--allow-generic".to_owned());
    let output = start_expecting_refusal(&stage, &arguments)?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(124), "it did not stay: {} {said}", output.status);
    ensure!(said.contains("generic"), "it does not say which mode it got: {said}");
    Ok(())
}

/// Of a version that says nothing of its layout, there is nothing to take over.
#[test]
fn pins_of_another_abi_are_left_alone() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    stage.ingress.stop(Signal::SIGTERM)?;
    let home = stage.bed.pin_path("ingress").join(format!("abi-{ABI_VERSION}"));
    let strange = home.with_file_name("abi-99");
    fs::rename(&home, &strange)?;
    fs::remove_file(strange.join("LAYOUT"))?;
    let output = start_expecting_refusal(&stage, stage.ingress.arguments())?;
    ensure_refused(&stage, &output, "ABI version 99")?;
    ensure!(!home.exists(), "it left something of its own behind");
    fs::rename(&strange, &home)?;
    stage.ingress.start_again(&stage.bed)?;
    stage.wait_healthy(&[0, 1, 2]).map(drop)
}

#[test]
fn a_corrupt_store_is_refused_and_traffic_goes_on() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    stage.ingress.stop(Signal::SIGTERM)?;
    let directory = stage.bed.path("state");
    let store = fs::read_dir(&directory)?
        .flatten()
        .map(|entry| entry.path())
        .max_by_key(|path| fs::metadata(path).map_or(0, |metadata| metadata.len()))
        .context("lbd left no store file")?;
    let whole = fs::read(&store)?;
    let mut broken = whole.clone();
    for byte in broken.iter_mut().take(4096) {
        *byte ^= 0xa5;
    }
    fs::write(&store, broken)?;

    let output = start_expecting_refusal(&stage, stage.ingress.arguments())?;
    ensure_refused(&stage, &output, &store.display().to_string())?;

    fs::write(&store, whole)?;
    stage.ingress.start_again(&stage.bed)?;
    stage.wait_healthy(&[0, 1, 2]).map(drop)
}

/// The status of a daemon, whatever its exit code, which is 0 or 1.
fn status(stage: &Stage) -> Result<(Value, Option<i32>)> {
    let output = stage.lbctl.output(&["status", "-o", "json"])?;
    Ok((serde_json::from_slice(&output.stdout)?, output.status.code()))
}

/// The state directory is lost, or another one is given: what the maps hold goes on, said to be so, until somebody
/// says what is to be.
#[test]
fn an_empty_store_takes_no_service_away() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), 100)?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    let (state, lost) = (stage.bed.path("state"), stage.bed.path("lost"));
    let services = stage.lbctl.json(&["status"])?["services"].as_u64().context("a number")?;

    stage.ingress.stop(Signal::SIGKILL)?;
    fs::rename(&state, &lost)?;
    // Twice: what holds once must hold over any number of restarts.
    for _ in 0..2 {
        stage.ingress.start_again(&stage.bed)?;
        let (told, code) = status(&stage)?;
        ensure!(code == Some(1) && told["orphaned_services"] == services, "{code:?} {told}");
        let problem = told["problems"][0].as_str().context("a problem")?;
        for part in ["the store is empty", "--state-dir", "lbctl config apply", "lbctl store accept 0"] {
            ensure!(problem.contains(part), "{problem}");
        }
        // Sweeps, next hops and verdicts come meanwhile.
        thread::sleep(Duration::from_secs(3));
        stage.ingress.stop(Signal::SIGTERM)?;
    }
    ensure!(holder.exchange()?.iter().all(|held| held.stays()), "an open connection broke");

    // The right directory again: all is well, and nothing has moved.
    fs::remove_dir_all(&state)?;
    fs::rename(&lost, &state)?;
    stage.ingress.start_again(&stage.bed)?;
    stage.wait_healthy(&[0, 1, 2])?;
    let (told, code) = status(&stage)?;
    ensure!(code == Some(0) && told["orphaned_services"].is_null(), "{told}");

    // A first change is the whole state.
    stage.ingress.stop(Signal::SIGTERM)?;
    fs::remove_dir_all(&state)?;
    stage.ingress.start_again(&stage.bed)?;
    let refused = stage.lbctl.output(&["store", "accept", "7"])?;
    ensure!(refused.status.code() == Some(4), "{}", String::from_utf8_lossy(&refused.stderr));
    stage.apply(&stage.configuration(&[0, 1, 2]))?;
    stage.wait_healthy(&[0, 1, 2])?;
    let (told, code) = status(&stage)?;
    ensure!(code == Some(0) && told["orphaned_services"].is_null(), "{told}");
    ensure!(holder.exchange()?.iter().all(|held| held.stays()), "an open connection broke");
    ensure_none_failed(&load.finish()?)?;

    // Really empty, by somebody's word.
    stage.ingress.stop(Signal::SIGTERM)?;
    fs::remove_dir_all(&state)?;
    stage.ingress.start_again(&stage.bed)?;
    stage.lbctl.run(&["store", "accept", "0"])?;
    let (told, code) = status(&stage)?;
    ensure!(code == Some(0) && told["orphaned_services"].is_null(), "{told}");
    let account = request(&stage, stage.targets(nginx::PORT), 20)?;
    ensure!(account.failed() == account.requests.len(), "services are still there");
    let refused = stage.lbctl.output(&["store", "accept", "0"])?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(4) && said.contains("nothing to accept"), "{said}");
    Ok(())
}

#[test]
fn a_full_disk_refuses_the_change_whole() -> Result<()> {
    let plan = Plan { backends: Some(2), state_bytes: Some(16 << 20), ..Plan::default() };
    let stage = Stage::start(plan)?;
    let before = stage.lbctl.run(&["config", "export"])?;
    let filler = stage.bed.path("state/filler");
    let mut file = File::create(&filler)?;
    while file.write_all(&[1; 4096]).is_ok() {}

    // The store may have some room of its own; it cannot have it for ever.
    let changes = ["w2", "w1"].iter().cycle().zip(["drain", "drain", "undrain", "undrain"].iter().cycle());
    let refusal = changes
        .take(2000)
        .map(|(worker, verb)| stage.lbctl.output(&["backend", verb, "web", worker]))
        .find(|output| output.as_ref().map_or(true, |output| !output.status.success()))
        .context("2,000 changes fitted on a full disk")??;
    let said = String::from_utf8_lossy(&refusal.stderr);
    ensure!(refusal.status.code() == Some(4), "{}: {said}", refusal.status);
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 200)?)?;

    fs::remove_file(&filler)?;
    for worker in ["w1", "w2"] {
        stage.lbctl.run(&["backend", "undrain", "web", worker])?;
    }
    let after = stage.lbctl.run(&["config", "export"])?;
    ensure!(before == after, "the state changed:\n{before}\n{after}");
    Ok(())
}

#[test]
fn a_killed_worker_agent_leaves_its_worker_in_service() -> Result<()> {
    let mut stage = Stage::start(Plan::default())?;
    let holder = Holder::open(&stage.bed.client, &stage.targets(LINES), 100)?;
    for host in &mut stage.hosts {
        host.agent.as_mut().expect("ipip has one").stop(Signal::SIGKILL, Duration::from_secs(5))?;
    }
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 300)?)?;
    ensure!(holder.exchange()?.iter().all(|held| held.stays()), "an open connection broke");
    Ok(())
}
