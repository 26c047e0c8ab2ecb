//! What happens to the ingress host's interfaces under a running lbd: status, metrics and the log name it within seconds,
//! what can be repaired is repaired, and all is well again by itself.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::{fs, path::PathBuf, time::Duration};
use test_support::{
    bed::{Bed, Layout},
    check::{ensure_none_failed, request},
    daemon::Ingress,
    netns::Namespace,
    nginx, program,
    stage::{Plan, Stage, WEB},
    wait,
};

const PATIENCE: Duration = Duration::from_secs(15);
/// How long a problem may be unknown to status: 2 s, and what a busy machine adds.
const SEEN: Duration = Duration::from_secs(3);

struct Trial {
    stage: Stage,
}

impl Trial {
    fn new() -> Result<Self> {
        let trial = Self { stage: Stage::start(Plan { offers: vec![WEB], ..Plan::default() })? };
        trial.ensure_well()?;
        Ok(trial)
    }

    fn ingress(&self) -> &Namespace {
        &self.stage.bed.ingress
    }

    fn pin(&self) -> PathBuf {
        self.stage.bed.pin_path("ingress").join("link-driver-eth0")
    }

    /// Waits until status is unhealthy (exit code 1) and a problem has all of these words.
    fn wait_named(&self, words: &[&str]) -> Result<()> {
        let took = wait::until(&format!("status says {words:?}"), SEEN, || {
            status(&self.stage.ingress).is_ok_and(|(code, found)| {
                let problems = found["problems"].as_array().cloned().unwrap_or_default();
                let named = problems.iter().filter_map(Value::as_str);
                code == 1 && named.into_iter().any(|p| words.iter().all(|word| p.contains(word)))
            })
        });
        let took = took.with_context(|| format!("status: {:?}", status(&self.stage.ingress)))?;
        eprintln!("named after {took:?}: {words:?}");
        let log = self.stage.ingress.process().output();
        let is_logged =
            log.lines().any(|line| line.contains("WARN") && words.iter().all(|w| line.contains(w)));
        ensure!(is_logged, "no log line has {words:?}: {log}");
        Ok(())
    }

    /// Waits until status is healthy, then sends requests, of which none may fail.
    fn ensure_well(&self) -> Result<()> {
        wait::until("status is healthy", PATIENCE, || {
            status(&self.stage.ingress).is_ok_and(|(code, found)| code == 0 && found["healthy"] == true)
        })
        .with_context(|| format!("status: {:?}", status(&self.stage.ingress)))?;
        ensure!(metric(&self.stage, "lb_interface_attached{interface=\"eth0\"}")? == 1.0);
        ensure_none_failed(&request(&self.stage, self.stage.targets(nginx::PORT), 100)?)
    }
}

/// Exit code and JSON of status.
fn status(ingress: &Ingress) -> Result<(i32, Value)> {
    let output = ingress.lbctl()?.output(&["status", "-o", "json"])?;
    let code = output.status.code().context("status was killed")?;
    Ok((code, serde_json::from_slice(&output.stdout).context("status is not JSON")?))
}

/// Value of a sample of the daemon's metrics.
fn metric(stage: &Stage, sample: &str) -> Result<f64> {
    let text = stage.bed.ingress.run("curl", &["-s", "http://127.0.0.1:9464/metrics"])?;
    let found = text.lines().find_map(|line| line.strip_prefix(sample));
    found.with_context(|| format!("no {sample} in {text}"))?.trim().parse().context("it is a number")
}

#[test]
fn a_deleted_interface_is_named_and_its_successor_serves() -> Result<()> {
    let mut trial = Trial::new()?;
    trial.ingress().ip(&["link", "del", "eth0"])?;
    trial.wait_named(&["eth0", "deleted"])?;
    ensure!(metric(&trial.stage, "lb_interface_attached{interface=\"eth0\"}")? == 0.0);
    let layout = trial.stage.plan.layout;
    trial.stage.bed.join_client_again(&layout)?;
    trial.ensure_well()
}

#[test]
fn an_interface_that_is_down_is_named_until_it_is_up() -> Result<()> {
    let trial = Trial::new()?;
    trial.ingress().ip(&["link", "set", "eth0", "down"])?;
    trial.wait_named(&["interface eth0 is down"])?;
    ensure!(metric(&trial.stage, "lb_interface_problem{interface=\"eth0\"}")? == 1.0);
    ensure!(metric(&trial.stage, "lb_interface_attached{interface=\"eth0\"}")? == 1.0);
    trial.ingress().ip(&["link", "set", "eth0", "up"])?;
    // The kernel removed the addresses of IPv6 with the link.
    trial.ingress().add_address("eth0", test_support::bed::INGRESS_V6.into(), 64)?;
    trial.ensure_well()?;

    trial.stage.bed.client.ip(&["link", "set", "eth0", "down"])?;
    trial.wait_named(&["interface eth0 has no carrier"])?;
    Ok(())
}

#[test]
fn an_interface_in_another_namespace_is_named_until_it_is_back() -> Result<()> {
    let trial = Trial::new()?;
    let other = trial.stage.bed.namespace("other")?;
    let index = trial.ingress().index("eth0")?;
    trial.ingress().ip(&["link", "set", "eth0", "netns", other.name()])?;
    trial.wait_named(&["eth0", "another network namespace"])?;
    // Back again, often with its old index, which the kernel has removed from all maps meanwhile.
    let ingress = trial.ingress().name().to_owned();
    other.ip(&["link", "set", "eth0", "netns", &ingress])?;
    trial.ingress().ip(&["link", "set", "eth0", "up"])?;
    eprintln!("index {index} before, {} now", trial.ingress().index("eth0")?);
    trial.ingress().add_address("eth0", test_support::bed::INGRESS_V4.into(), 24)?;
    trial.ingress().add_address("eth0", test_support::bed::INGRESS_V6.into(), 64)?;
    trial.ensure_well()
}

#[test]
fn a_stranger_with_the_old_index_is_not_taken_for_the_interface() -> Result<()> {
    let mut trial = Trial::new()?;
    let other = trial.stage.bed.namespace("other")?;
    let index = trial.ingress().index("eth0")?.to_string();
    // The program runs on in the other namespace, under a link that names this index.
    trial.ingress().ip(&["link", "set", "eth0", "netns", other.name()])?;
    trial.wait_named(&["eth0", "another network namespace"])?;
    trial.stage.bed.client.ip(&["link", "set", "eth0", "name", "old"])?;
    let ingress = trial.ingress();
    ingress.ip(&["link", "add", "eth0", "index", &index, "type", "veth", "peer", "name", "end"])?;
    wait::until("the program is on the new interface", PATIENCE, || {
        ingress.ip(&["link", "show", "dev", "eth0"]).is_ok_and(|text| text.contains("prog/xdp"))
    })?;
    ensure!(ingress.index("eth0")?.to_string() == index, "the kernel gave it another index");
    ingress.ip(&["link", "del", "eth0"])?;
    trial.wait_named(&["eth0", "not attached"])?;
    trial.stage.bed.client.ip(&["link", "del", "old"])?;
    let layout = trial.stage.plan.layout;
    trial.stage.bed.join_client_again(&layout)?;
    trial.ensure_well()
}

#[test]
fn a_replaced_program_is_put_back() -> Result<()> {
    let trial = Trial::new()?;
    let shown = || trial.ingress().ip(&["link", "show", "dev", "eth0"]).unwrap_or_default();
    let program =
        |text: &str| text.split("prog/xdp id ").nth(1).map(|rest| rest.split(' ').next().map(str::to_owned));
    let before = program(&shown());
    ensure!(before.is_some(), "{}", shown());
    program::replace_by_pass(&trial.pin())?;
    wait::until("it is put back", SEEN, || program(&shown()) == before)?;
    let log = trial.stage.ingress.process().output();
    ensure!(log.contains("somebody replaced the program under lbd's link"), "{log}");
    trial.ensure_well()
}

#[test]
fn anothers_program_is_named_and_left_alone() -> Result<()> {
    let trial = Trial::new()?;
    // Else lbd could be first.
    trial.stage.ingress.process().signal(Signal::SIGSTOP)?;
    program::detach_link(&trial.pin())?;
    let another = program::attach_pass(trial.ingress(), "eth0")?;
    trial.stage.ingress.process().signal(Signal::SIGCONT)?;
    trial.wait_named(&["eth0", "already has an XDP program that this lbd did not attach"])?;
    ensure!(metric(&trial.stage, "lb_interface_attached{interface=\"eth0\"}")? == 0.0);
    drop(another);
    trial.ensure_well()
}

#[test]
fn a_renamed_interface_goes_on_even_over_a_restart() -> Result<()> {
    let mut trial = Trial::new()?;
    let rename = |trial: &Trial, from: &str, to: &str| -> Result<()> {
        trial.ingress().ip(&["link", "set", from, "down"])?;
        trial.ingress().ip(&["link", "set", from, "name", to])?;
        trial.ingress().ip(&["link", "set", to, "up"])?;
        trial.ingress().add_address(to, test_support::bed::INGRESS_V6.into(), 64)?;
        Ok(())
    };
    let serves = |trial: &Trial| -> Result<()> {
        ensure_none_failed(&request(&trial.stage, trial.stage.targets(nginx::PORT), 100)?)
    };
    rename(&trial, "eth0", "lan0")?;
    trial.wait_named(&["eth0 is now named lan0", "--iface lan0"])?;
    wait_neighbours(&trial)?;
    serves(&trial)?;
    trial.stage.ingress.stop(Signal::SIGTERM)?;
    trial.stage.ingress.start_again(&trial.stage.bed)?;
    trial.wait_named(&["eth0 is now named lan0", "--iface lan0"])?;
    serves(&trial)?;
    rename(&trial, "lan0", "eth0")?;
    trial.ensure_well()
}

/// Waits until the client's address answers: a link that was down has lost its neighbours.
fn wait_neighbours(trial: &Trial) -> Result<()> {
    let client = test_support::bed::CLIENT_V6.to_string();
    wait::until("the client answers", PATIENCE, || {
        trial.ingress().run("ping", &["-c", "1", "-W", "1", &client]).is_ok()
    })
    .map(drop)
}

#[test]
fn lbd_starts_without_any_interface_and_waits() -> Result<()> {
    let mut bed = Bed::new(Layout { workers: 0, ..Layout::default() })?;
    bed.ingress.ip(&["link", "del", "eth0"])?;
    let ingress = Ingress::start(&bed, &[])?;
    let (code, found) = status(&ingress)?;
    ensure!(
        code == 1 && found["problems"].to_string().contains("interface eth0 does not exist"),
        "{found:#}"
    );
    // On-demand features must be in the program that is attached later.
    let lbctl = ingress.lbctl()?;
    lbctl.run(&[
        "service",
        "add",
        "web",
        "--vip",
        "10.99.0.1",
        "--port",
        "80",
        "--protocol",
        "tcp",
        "--scheduler",
        "p2c",
    ])?;
    bed.join_client_again(&Layout::default())?;
    wait::until("it is attached", SEEN, || {
        bed.ingress.ip(&["link", "show", "dev", "eth0"]).is_ok_and(|text| text.contains("prog/xdp"))
    })?;
    wait::until("status knows", SEEN, || {
        status(&ingress).is_ok_and(|(_, found)| {
            found["interfaces"][0]["name"] == "eth0" && !found["problems"].to_string().contains("eth0")
        })
    })?;
    ensure!(fs::read_dir(bed.pin_path("ingress"))?.flatten().any(|e| e.file_name() == "link-driver-eth0"));
    Ok(())
}
