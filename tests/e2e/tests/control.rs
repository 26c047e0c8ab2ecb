//! The control plane against a real kernel: starts that must be refused, routes and neighbours that
//! change, configuration files, workers' VIPs, and who may do what.

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{
    fs,
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
    time::Duration,
};
use test_support::{
    bed::{Bed, Layout, binary, vip_v4, vip_v6},
    check,
    daemon::{Ingress, Lbctl, start_worker},
    netns::Namespace,
    stage::{Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// Runs `lbd ARGUMENTS` in a namespace to its end.
fn lbd(namespace: &Namespace, arguments: &[&str]) -> Result<Output> {
    let mut command = namespace.command(binary("lbd")?);
    command.args(arguments).output().context("cannot start lbd")
}

/// Ensures that a program ended with this code, saying all of `words` on standard error.
fn ensure_refused(what: &str, output: &Output, code: i32, words: &[&str]) -> Result<()> {
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(code), "{what}: {}, not {code}: {text}", output.status);
    for word in words {
        ensure!(text.contains(word), "{what}: {word:?} is not in {text}");
    }
    Ok(())
}

#[test]
fn a_backend_that_nobody_checks_and_nobody_can_reach_is_a_problem() -> Result<()> {
    let stage = Stage::start(Plan { offers: vec![WEB], ..Plan::default() })?;
    let lbctl = &stage.lbctl;
    let vip = format!("{}:81/tcp", vip_v4(1));
    lbctl.run(&["service", "add", "plain", "--vip", &vip, "--health", "none"])?;
    stage.change_backend_of("plain", "add", 0)?;
    let ghost = match stage.backend_address(0, false) {
        IpAddr::V4(address) => Ipv4Addr::from(u32::from(address) | 0xfa).to_string(),
        IpAddr::V6(_) => bail!("it was asked for IPv4"),
    };
    lbctl.run(&["backend", "add", "plain", "ghost", &ghost])?;
    let says = |words: &str| {
        let output = lbctl.output(&["status"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        anyhow::Ok(output.status.code() == Some(1) && text.contains(words))
    };
    let problem = "unreachable: plain/ghost";
    wait::until("status names it", PATIENCE * 2, || says(problem).unwrap_or(false))?;
    let list = lbctl.run(&["backend", "list", "plain"])?;
    let health =
        |name: &str| list.lines().find(|line| line.contains(&format!("  {name} "))).map(str::to_owned);
    ensure!(health("ghost").is_some_and(|line| line.contains("unreachable")), "{list}");
    let slots = |name: &str| -> Result<u64> {
        let shown = lbctl.json(&["backend", "show", "plain", name])?;
        shown["status"]["slots"].as_u64().context("it has a number of slots")
    };
    ensure!(slots("ghost")? == 0 && slots("w1")? > 0, "new flows go where nothing is: {list}");
    ensure!(health("w1").is_some_and(|line| line.contains("unchecked")), "{list}");

    // A check takes the ghost out, so that it is unhealthy instead.
    lbctl.run(&["service", "set", "plain", "--health", "tcp", "--health-interval", "200ms"])?;
    wait::until("the check decides", PATIENCE * 2, || {
        says("unhealthy").unwrap_or(false) && !says(problem).unwrap_or(true)
    })
    .map(drop)
}

#[test]
fn a_start_that_cannot_work_is_refused_and_touches_nothing() -> Result<()> {
    let stage = Stage::start(Plan { offers: vec![WEB], ..Plan::default() })?;
    let bed = &stage.bed;
    let path = |p: &Path| p.display().to_string();
    let own = [
        "--state-dir",
        &path(&bed.path("other")),
        "--socket",
        &path(&bed.path("other.sock")),
        "--metrics",
        "off",
    ]
    .map(str::to_owned);
    let other_pins = path(&bed.pin_path("other"));
    let first_pins = path(&bed.pin_path("ingress"));
    let not_bpf = path(&bed.path("not-bpf"));
    let first_state = path(&bed.path("state"));
    let first_socket = path(&bed.path("lbd.sock"));
    // Exit code, and what is said.
    let cases: [(&str, &[&str], i32, &[&str]); 6] = [
        (
            "the same pins",
            &["--iface", "eth0", "--pin-path", &first_pins],
            4,
            &["another lbd (pid ", "--pin-path"],
        ),
        (
            "the same interface",
            &["--iface", "eth0", "--pin-path", &other_pins],
            4,
            &["interface eth0", "XDP program"],
        ),
        (
            "the same store",
            &["--iface", "eth0", "--pin-path", &other_pins, "--state-dir", &first_state],
            4,
            &[".redb is in use", "--state-dir"],
        ),
        (
            "the same socket",
            &["--iface", "eth0", "--pin-path", &other_pins, "--socket", &first_socket],
            4,
            &["served by another lbd", "--socket"],
        ),
        (
            "no driver support",
            &["--iface", "lo", "--pin-path", &other_pins],
            4,
            &["interface lo", "does not support native XDP", "--allow-generic"],
        ),
        (
            "no bpf filesystem",
            &["--iface", "eth0", "--pin-path", &not_bpf],
            4,
            &["not on a BPF filesystem", "mount"],
        ),
    ];
    for (what, arguments, code, words) in cases {
        let mut all = vec!["ingress"];
        // What a case names itself comes instead of our own.
        for pair in own.chunks(2).filter(|pair| !arguments.contains(&pair[0].as_str())) {
            all.extend(pair.iter().map(String::as_str));
        }
        all.extend(arguments);
        ensure_refused(what, &lbd(&bed.ingress, &all)?, code, words)?;
        ensure!(!bed.path("other.sock").exists(), "{what}: a socket is left behind");
    }
    check::ensure_none_failed(&check::request(&stage, stage.targets(WEB.port), 50)?)?;
    stage.lbctl.run(&["status"])?;
    Ok(())
}

#[test]
fn without_privileges_the_start_is_refused() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    let directory = bed.path("nobody");
    fs::create_dir(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777))?;
    let state = directory.join("state").display().to_string();
    let socket = directory.join("s").display().to_string();
    let pins = bed.pin_path("nobody").display().to_string();
    let mut command = bed.ingress.command("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(binary("lbd")?);
    command.args([
        "ingress",
        "--iface",
        "eth0",
        "--metrics",
        "off",
        "--state-dir",
        &state,
        "--socket",
        &socket,
    ]);
    let output = command.args(["--pin-path", &pins]).output()?;
    ensure_refused("no capabilities", &output, 4, &["not permitted", "CAP_BPF"])
}

#[test]
fn a_store_that_is_no_store_is_refused_and_kept() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    let state = bed.path("state");
    fs::create_dir(&state)?;
    fs::write(state.join("lb.redb"), "not a store")?;
    let (state_text, pins) = (state.display().to_string(), bed.pin_path("p").display().to_string());
    let output =
        lbd(&bed.ingress, &["ingress", "--iface", "eth0", "--state-dir", &state_text, "--pin-path", &pins])?;
    ensure_refused("a damaged store", &output, 4, &["lb.redb is damaged", "move it away"])?;
    ensure!(fs::read(state.join("lb.redb"))? == b"not a store", "the file was changed");
    ensure!(!bed.pin_path("p").exists(), "something was pinned");
    Ok(())
}

/// The next hop of a backend: interface index, MAC, MTU; None while it is not resolved.
fn next_hop(lbctl: &Lbctl) -> Option<(u64, Vec<u64>, u64)> {
    let backend = lbctl.json(&["backend", "show", "web", "w1"]).ok()?;
    let hop = backend["status"]["next_hop"].as_object()?;
    let mac = hop["next_hop"].as_array()?.iter().filter_map(Value::as_u64).collect();
    Some((hop["ifindex"].as_u64()?, mac, hop["mtu"].as_u64()?))
}

#[test]
fn routes_links_and_neighbours_are_followed() -> Result<()> {
    let bed = Bed::new(Layout { workers: 2, ..Layout::default() })?;
    let ingress = Ingress::start(&bed, &[])?;
    let lbctl = ingress.lbctl()?;
    let address = bed.workers[0].v4.to_string();
    lbctl.run(&["service", "add", "web", "--vip", &format!("{}:80/tcp", vip_v4(1))])?;
    lbctl.run(&["backend", "add", "web", "w1", &address])?;
    let (one, two) = (u64::from(bed.ingress.index("w1")?), u64::from(bed.ingress.index("w2")?));
    let follows = |what: &str, holds: &dyn Fn(&Option<(u64, Vec<u64>, u64)>) -> bool| {
        wait::until(what, PATIENCE, || holds(&next_hop(&lbctl)))
            .with_context(|| format!("{:?}", next_hop(&lbctl)))
    };
    follows("the next hop is known", &|hop| hop.as_ref().is_some_and(|h| h.0 == one))?;

    bed.workers[0].namespace.ip(&["link", "set", "eth0", "address", "02:00:00:00:00:77"])?;
    bed.ingress.ip(&["neighbour", "flush", "dev", "w1"])?;
    follows("the new MAC is taken", &|hop| hop.as_ref().is_some_and(|h| h.1 == [2, 0, 0, 0, 0, 0x77]))?;

    let via = bed.workers[1].v4.to_string();
    let detour = [&format!("{address}/32"), "via", &via, "mtu", "1400"];
    bed.ingress.ip(&[&["route", "add"], &detour[..]].concat())?;
    follows("the route is followed", &|hop| hop.as_ref().is_some_and(|h| (h.0, h.2) == (two, 1_400)))?;
    bed.ingress.ip(&[&["route", "del"], &detour[..]].concat())?;
    follows("and back", &|hop| hop.as_ref().is_some_and(|h| h.0 == one && h.2 > 1_400))?;

    bed.ingress.ip(&["link", "set", "w1", "mtu", "1450"])?;
    follows("the MTU is taken", &|hop| hop.as_ref().is_some_and(|h| h.2 == 1_450))?;
    bed.ingress.ip(&["link", "set", "w1", "down"])?;
    follows("a link that is down has no next hop", &Option::is_none)?;
    bed.ingress.ip(&["link", "set", "w1", "up"])?;
    follows("and again when it is up", &|hop| hop.as_ref().is_some_and(|h| h.0 == one))?;

    bed.workers[0].namespace.ip(&["link", "set", "eth0", "down"])?;
    follows("no carrier is no next hop", &Option::is_none)?;
    Ok(())
}

const FILE: &str = r#"
[[service]]
name = "web"
vip = "10.99.0.9"
port = 80
protocol = "tcp"
[[service.backend]]
name = "a"
address = "10.1.1.2"
weight = 3
"#;

#[test]
fn a_file_is_loaded_reloaded_and_refused_whole() -> Result<()> {
    let bed = Bed::new(Layout { workers: 1, ..Layout::default() })?;
    let file = bed.path("lb.toml");
    fs::write(&file, FILE)?;
    let file_text = file.display().to_string();
    let mut ingress = Ingress::start(&bed, &["--config", &file_text])?;
    let lbctl = ingress.lbctl()?;
    let weight = || -> Result<Option<u64>> {
        Ok(lbctl.json(&["backend", "show", "web", "a"])?["spec"]["weight"].as_u64())
    };
    ensure!(weight()? == Some(3));
    lbctl.run(&["backend", "set", "web", "a", "--weight", "4"])?;

    lbctl.run(&["backend", "drain", "web", "a", "--message", "RAM swap"])?;
    let draining = || -> Result<bool> {
        Ok(lbctl.json(&["backend", "show", "web", "a"])?["spec"]["state"] == "draining")
    };

    // Neither a restart nor a reload undoes what was changed since the file was loaded.
    ingress.stop(Signal::SIGTERM)?;
    ingress.start_again(&bed)?;
    wait::until("the daemon answers", PATIENCE, || weight().is_ok())?;
    ensure!(weight()? == Some(4), "the file won over the store");
    ingress.process().signal(Signal::SIGHUP)?;
    wait::until("the reload is done", PATIENCE, || {
        ingress.process().output().contains("configuration reloaded")
    })?;
    ensure!(weight()? == Some(4) && draining()?, "the reload undid what lbctl changed");

    let revision = || -> Result<Value> {
        Ok(lbctl.json(&["history", "--limit", "1"])?["revisions"][0]["number"].clone())
    };
    let before = revision()?;
    fs::write(&file, FILE.replace("weight = 3", "wieght = 5").replace("10.1.1.2", "10.1.1.3"))?;
    ingress.process().signal(Signal::SIGHUP)?;
    wait::until("the mistake is told", PATIENCE, || {
        ingress.process().output().contains("did you mean weight?")
    })?;
    ensure!(revision()? == before, "a wrong file changed something");
    let problem = "services of the configuration file are not in force";
    let tells = || -> Result<bool> {
        let output = lbctl.output(&["status"])?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(output.status.code() == Some(1) && text.contains(problem) && text.contains("did you mean weight?"))
    };
    wait::until("status tells it too", PATIENCE, || tells().unwrap_or(false))?;
    // A start with that file goes on with what is stored.
    ingress.stop(Signal::SIGTERM)?;
    ingress.start_again(&bed)?;
    wait::until("status tells it", PATIENCE, || tells().unwrap_or(false))?;
    ensure!(weight()? == Some(4) && draining()?, "the state was lost");
    fs::write(&file, FILE.replace("weight = 3", "weight = 5"))?;
    ingress.process().signal(Signal::SIGHUP)?;
    wait::until("the mended file is applied", PATIENCE, || weight().ok().flatten() == Some(5))?;
    ensure!(draining()?, "the file changed the weight alone");
    wait::until("the problem is over", PATIENCE, || {
        lbctl.output(&["status"]).is_ok_and(|o| !String::from_utf8_lossy(&o.stdout).contains(problem))
    })?;

    // An address of this host is no VIP without a second thought.
    let own = ["service", "add", "own", "--vip", "10.0.0.1:81/tcp"];
    let refused = lbctl.output(&own)?;
    ensure_refused(
        "an own address",
        &refused,
        4,
        &["10.0.0.1 is an address of this host (on eth0)", "--force"],
    )?;
    lbctl.run(&[&own[..], &["--force"]].concat())?;

    let other =
        lbd(&bed.ingress, &["ingress", "--config", &file_text, "--iface", "eth0", "--metrics", "nonsense"])?;
    ensure_refused("a wrong setting", &other, 2, &["metrics", "neither ADDRESS:PORT nor off"])
}

#[test]
fn only_root_and_the_group_may_change_things() -> Result<()> {
    let bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    fs::set_permissions(bed.directory(), fs::Permissions::from_mode(0o755))?;
    let ingress = Ingress::start(&bed, &["--socket-mode", "0666"])?;
    let lbctl = ingress.lbctl()?;
    let add = ["service", "add", "web", "--vip", "10.99.0.9:80/tcp"];
    lbctl.run(&add)?;
    // A copy that anyone may run, wherever the build is.
    let program = bed.path("lbctl");
    fs::copy(binary("lbctl")?, &program)?;
    let as_nobody = |arguments: &[&str]| -> Result<Output> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(&program);
        Ok(command.arg("--socket").arg(bed.path("lbd.sock")).args(arguments).output()?)
    };
    let looked = as_nobody(&["service", "list"])?;
    ensure!(looked.status.success(), "{}", String::from_utf8_lossy(&looked.stderr));
    ensure_refused(
        "a change",
        &as_nobody(&["service", "rm", "web"])?,
        4,
        &["may read, but not make changes"],
    )?;
    ensure!(as_nobody(&["service", "rm", "web", "--dry-run"])?.status.success(), "trying is looking");
    ensure!(lbctl.json(&["service", "list"])?.as_array().is_some_and(|list| list.len() == 1));
    let history = lbctl.json(&["history"])?;
    ensure!(history["revisions"][0]["author"] == "root", "{history}");

    fs::set_permissions(bed.path("lbd.sock"), fs::Permissions::from_mode(0o660))?;
    ensure_refused(
        "a look, with the usual mode",
        &as_nobody(&["service", "list"])?,
        3,
        &["Permission denied", "group"],
    )
}

#[test]
fn a_worker_holds_its_vips_and_gives_back_only_its_own() -> Result<()> {
    let bed = Bed::new(Layout { workers: 1, ..Layout::default() })?;
    let worker = &bed.workers[0];
    let held = || worker.namespace.ip(&["address", "show", "dev", "lo"]);
    worker.namespace.ip(&["address", "add", "10.99.0.77/32", "dev", "lo"])?;
    let (v4, v6): (IpAddr, IpAddr) = (vip_v4(1).into(), vip_v6(1).into());
    let mut first = start_worker(&bed, worker, &[v4, v6], &[])?;
    first.stop(Signal::SIGTERM, PATIENCE)?;
    let text = held()?;
    ensure!(text.contains(&v4.to_string()) && text.contains(&v6.to_string()), "a stop took VIPs off: {text}");

    let mut second = start_worker(&bed, worker, &[v4], &[])?;
    wait::until("the VIP that is no longer served is gone", PATIENCE, || {
        held().is_ok_and(|t| !t.contains(&v6.to_string()))
    })?;
    second.stop(Signal::SIGTERM, PATIENCE)?;

    let pins = bed.pin_path(&worker.name).display().to_string();
    let output = lbd(&worker.namespace, &["worker", "--detach", "--pin-path", &pins])?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = held()?;
    ensure!(!text.contains(&format!("{v4}/")) && text.contains("10.99.0.77/32"), "{text}");
    ensure!(
        !worker.namespace.ip(&["link", "show", "dev", "eth0"])?.contains("xdp"),
        "the program is still attached"
    );
    let output =
        lbd(&worker.namespace, &["worker", "--iface", "eth9", "--vip", "10.99.0.1", "--pin-path", &pins])?;
    ensure_refused("no such interface", &output, 5, &["interface eth9 does not exist", "eth0"])
}
