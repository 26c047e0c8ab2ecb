//! Attaching: interfaces that come late, go, or have another name; drivers that refuse; frags where the MTU needs them.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{fs, path::Path, process::Output, time::Duration};
use test_support::{
    bed::{Bed, Layout, binary},
    check::{ensure_none_failed, request},
    daemon::Ingress,
    http::{Load, Running},
    nginx, program,
    stage::{Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(15);

/// What status says, whether it is healthy (exit code 0) or not (1).
fn status(ingress: &Ingress) -> Result<Value> {
    let output = ingress.lbctl()?.output(&["status", "-o", "json"])?;
    ensure!(matches!(output.status.code(), Some(0 | 1)), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("status is not JSON")
}

/// Adds a virtual interface whose driver refuses XDP: it has fewer rx queues than its peer has tx queues.
fn add_refusing(bed: &Bed, name: &str, peer: &str) -> Result<()> {
    // Both numbers have to be given, or the kernel uses one queue of each kind.
    let ours = ["numrxqueues", "1", "numtxqueues", "1", "type", "veth"];
    let theirs = ["numrxqueues", "4", "numtxqueues", "4"];
    bed.ingress.ip(&[&["link", "add", name][..], &ours, &["peer", "name", peer], &theirs].concat())?;
    bed.ingress.ip(&["link", "set", name, "up"])?;
    bed.ingress.ip(&["link", "set", peer, "up"])?;
    Ok(())
}

/// Starts another lbd on the pins of the first.
fn lbd_at(bed: &Bed, pins: &Path) -> Result<Output> {
    let pins = pins.display().to_string();
    start(bed, &["--iface", "eth0", "--pin-path", &pins])
}

fn lbd(bed: &Bed, arguments: &[&str]) -> Result<Output> {
    let pins = bed.pin_path("second").display().to_string();
    start(bed, &[arguments, &["--pin-path", &pins]].concat())
}

fn start(bed: &Bed, arguments: &[&str]) -> Result<Output> {
    let mut command = bed.ingress.command(binary("lbd")?);
    command.arg("ingress").args(arguments).args(["--metrics", "off"]);
    for (flag, name) in [("--state-dir", "state-2"), ("--socket", "lbd-2.sock")] {
        command.arg(flag).arg(bed.path(name));
    }
    command.output().context("cannot start lbd")
}

#[test]
fn a_drivers_own_sentence_is_told_with_what_helps() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    add_refusing(&bed, "few", "many")?;
    let output = lbd(&bed, &["--iface", "few"])?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(5), "time may mend it: {}: {said}", output.status);
    for words in ["interface few", "driver veth", "rx queues", "ethtool -L few rx N", "--allow-generic"] {
        ensure!(said.contains(words), "{words:?} is not in {said}");
    }
    ensure!(!bed.pin_path("second").exists(), "the refused start leaves pins behind");

    // Another interface is used meanwhile, and this one as soon as its driver takes the program.
    let ingress = Ingress::start(&bed, &["--iface", "few"])?;
    let found = status(&ingress)?;
    let waiting = &found["loaded"]["waiting"][0];
    ensure!(waiting["name"] == "few", "{found:#}");
    ensure!(waiting["reason"].as_str().is_some_and(|r| r.contains("rx queues")), "{found:#}");
    ensure!(found["healthy"] == false && found["problems"].to_string().contains("few"), "{found:#}");
    bed.ingress.ip(&["link", "del", "few"])?;
    bed.ingress.ip(&["link", "add", "few", "type", "veth", "peer", "name", "many"])?;
    bed.ingress.ip(&["link", "set", "few", "up"])?;
    wait::until("lbd attaches once the driver takes it", PATIENCE, || {
        status(&ingress).is_ok_and(|s| s["interfaces"][1]["name"] == "few")
    })?;
    let found = status(&ingress)?;
    ensure!(found["loaded"]["waiting"].as_array().is_some_and(Vec::is_empty), "{found:#}");
    Ok(())
}

#[test]
fn generic_mode_is_for_any_refusal_and_says_why() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    add_refusing(&bed, "few", "many")?;
    let ingress = Ingress::start(&bed, &["--iface", "few", "--allow-generic"])?;
    let found = status(&ingress)?;
    let few = &found["interfaces"][1];
    ensure!(found["interfaces"][0]["mode"] == "driver" && few["mode"] == "generic", "{found:#}");
    ensure!(few["why_generic"].as_str().is_some_and(|why| why.contains("rx queues")), "{found:#}");
    ensure!(found["loaded"]["frags"] == false, "generic mode never has frags: {found:#}");
    let text = ingress.lbctl()?.run(&["status"])?;
    ensure!(text.contains("few (generic XDP)") && text.contains("rx queues"), "{text}");
    Ok(())
}

#[test]
fn an_interface_may_come_late_and_come_back() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    let ingress = Ingress::start(&bed, &["--iface", "late"])?;
    let found = status(&ingress)?;
    ensure!(found["loaded"]["waiting"][0]["name"] == "late", "{found:#}");
    for time in ["first", "second"] {
        bed.ingress.ip(&["link", "add", "late", "type", "veth", "peer", "name", "other"])?;
        bed.ingress.ip(&["link", "set", "late", "up"])?;
        wait::until(&format!("attached, the {time} time"), PATIENCE, || {
            bed.ingress.ip(&["link", "show", "dev", "late"]).is_ok_and(|text| text.contains("xdp"))
                && status(&ingress).is_ok_and(|s| s["interfaces"][1]["name"] == "late")
        })?;
        bed.ingress.ip(&["link", "del", "late"])?;
        wait::until("it is missed", PATIENCE, || {
            status(&ingress).is_ok_and(|s| s["loaded"]["waiting"][0]["name"] == "late")
        })?;
    }
    Ok(())
}

#[test]
fn a_renamed_interface_keeps_its_link() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    let pins = bed.pin_path("ingress");
    let add = |name: &str, peer: &str| -> Result<()> {
        bed.ingress.ip(&["link", "add", name, "type", "veth", "peer", "name", peer])?;
        bed.ingress.ip(&["link", "set", name, "up"])?;
        Ok(())
    };
    add("a0", "p0")?;
    add("a1", "p1")?;
    let mut ingress = Ingress::start(&bed, &["--iface", "a0", "--iface", "a1"])?;
    let program =
        |name: &str| -> Result<bool> { Ok(bed.ingress.ip(&["link", "show", "dev", name])?.contains("xdp")) };
    // The socket is there before the programs are; what answers on it comes after them.
    status(&ingress)?;
    ensure!(program("a0")? && program("a1")?);
    ingress.stop(Signal::SIGTERM)?;
    // The names change places, so that each one's pin has the name of the other.
    for (from, to) in [("a0", "tmp"), ("a1", "a0"), ("tmp", "a1")] {
        bed.ingress.ip(&["link", "set", from, "down"])?;
        bed.ingress.ip(&["link", "set", from, "name", to])?;
        bed.ingress.ip(&["link", "set", to, "up"])?;
    }
    ingress.start_again(&bed)?;
    let found = status(&ingress)?;
    ensure!(found["interfaces"].as_array().is_some_and(|all| all.len() == 3), "{found:#}");
    let mut names: Vec<String> = std::fs::read_dir(&pins)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("link-"))
        .collect();
    names.sort();
    ensure!(names == ["link-driver-a0", "link-driver-a1", "link-driver-eth0"], "{names:?}");
    Ok(())
}

/// Paths of the pins under a directory, sorted.
fn pins(directory: &Path) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            all.extend(pins(&path)?);
        } else {
            all.push(path.display().to_string());
        }
    }
    all.sort();
    Ok(all)
}

#[test]
fn removed_pins_come_back_and_no_packet_is_lost() -> Result<()> {
    let mut stage = Stage::start(Plan { offers: vec![WEB], ..Plan::default() })?;
    status(&stage.ingress)?;
    let load = Running::start(&stage.bed.client, Load::new(stage.targets(nginx::PORT)))?;
    let more = |count: usize| -> Result<()> {
        let seen = load.count();
        wait::until("requests go on", PATIENCE, || load.count() > seen + count).map(drop)
    };
    more(100)?;
    let directory = stage.bed.pin_path("ingress");
    let before = pins(&directory)?;
    for round in 0..2 {
        fs::remove_dir_all(&directory).context("bpffs lets root remove pins")?;
        wait::until("the pins are back", PATIENCE, || pins(&directory).is_ok_and(|now| now == before))
            .with_context(|| format!("round {round}: {before:?}, now {:?}", pins(&directory)))?;
        more(100)?;
    }
    let found = status(&stage.ingress)?;
    ensure!(found["healthy"] == true, "{found:#}");

    // They are the same objects: a later daemon finds its links, programs and maps there.
    let second = lbd_at(&stage.bed, &directory)?;
    ensure!(second.status.code() == Some(4), "another lbd started: {second:?}");
    stage.ingress.stop(Signal::SIGKILL)?;
    more(100)?;
    stage.ingress.start_again(&stage.bed)?;
    let found = status(&stage.ingress)?;
    ensure!(found["healthy"] == true, "{found:#}");
    more(100)?;
    ensure_none_failed(&load.finish()?)
}

#[test]
fn a_detached_program_is_attached_again_and_a_link_that_is_down_is_named() -> Result<()> {
    let stage = Stage::start(Plan { offers: vec![WEB], ..Plan::default() })?;
    status(&stage.ingress)?;
    let index = || status(&stage.ingress).map(|s| s["interfaces"][0]["ifindex"].clone());
    let before = index()?;
    program::detach_link(&stage.bed.pin_path("ingress").join("link-driver-eth0"))?;
    let shown = |name: &str| stage.bed.ingress.ip(&["link", "show", "dev", name]);
    ensure!(!shown("eth0")?.contains("prog/xdp"), "the link is detached");
    wait::until("the program is attached again", PATIENCE, || {
        shown("eth0").is_ok_and(|text| text.contains("prog/xdp"))
    })?;
    ensure!(index()? == before, "it is the same interface");
    ensure_none_failed(&request(&stage, stage.targets(nginx::PORT), 100)?)?;

    let names = |words: &str| status(&stage.ingress).is_ok_and(|s| s["problems"].to_string().contains(words));
    stage.bed.ingress.ip(&["link", "set", "eth0", "down"])?;
    wait::until("status names it", PATIENCE, || names("interface eth0 is down"))?;
    stage.bed.ingress.ip(&["link", "set", "eth0", "up"])?;
    wait::until("it is forgotten", PATIENCE, || !names("interface eth0"))?;
    Ok(())
}

#[test]
fn frags_are_for_large_mtus_and_change_under_traffic() -> Result<()> {
    let mut stage = Stage::start(Plan { offers: vec![WEB], ..Plan::default() })?;
    let serves = |stage: &Stage| ensure_none_failed(&request(stage, stage.targets(nginx::PORT), 50)?);
    ensure!(status(&stage.ingress)?["loaded"]["frags"] == false, "MTU 1600 needs none");
    serves(&stage)?;

    // One more interface, of a large MTU: all programs are loaded anew with frags, over the same maps.
    stage.ingress.stop(Signal::SIGTERM)?;
    stage.bed.ingress.ip(&["link", "add", "jumbo", "mtu", "9000", "type", "veth", "peer", "name", "end"])?;
    stage.bed.ingress.ip(&["link", "set", "end", "mtu", "9000"])?;
    stage.bed.ingress.ip(&["link", "set", "jumbo", "up"])?;
    let mut arguments = vec!["--iface", "jumbo"];
    arguments.extend(stage.plan.arguments);
    stage.ingress = Ingress::start(&stage.bed, &arguments)?;
    let found = status(&stage.ingress)?;
    ensure!(found["loaded"]["frags"] == true, "MTU 9000 needs them: {found:#}");
    ensure!(found["interfaces"].as_array().is_some_and(|all| all.len() == 2), "{found:#}");
    serves(&stage)?;
    let counted = found["reasons"].to_string();
    ensure!(!counted.contains("stage_missing"), "a jump met an empty place: {counted}");

    // What runs with the flag keeps it, although no interface needs it any more.
    stage.ingress.stop(Signal::SIGTERM)?;
    stage.ingress = Ingress::start(&stage.bed, stage.plan.arguments)?;
    ensure!(status(&stage.ingress)?["loaded"]["frags"] == true, "it ran with frags");
    serves(&stage)
}
