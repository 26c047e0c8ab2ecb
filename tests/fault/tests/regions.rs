//! Two regions, four ingress hosts, four workers, three etcd members: what the regions demo tells, asserted.

use anyhow::{Context, Result, ensure};
use test_support::{
    replica,
    story::{Step, Story},
};

/// What a worker process runs.
#[test]
#[ignore = "started as a worker by the other test"]
fn is_a_replica() -> Result<()> {
    replica::serve()
}

#[test]
fn regions_hosts_workers_and_etcd_fail_one_after_the_other() -> Result<()> {
    let mut story = Story::start("is_a_replica")?;
    let steps = story.run(|step| println!("{step:#?}"))?;
    for step in &steps {
        ensure!(step.requests > 0 && step.failed == 0, "{}: {} requests failed", step.name, step.failed);
        ensure!(step.broken == 0, "{}: {} connections broke", step.name, step.broken);
        ensure!(step.is_clean(), "{}: what may run in the east only ran elsewhere", step.name);
    }
    let step =
        |name: &str| -> Result<&Step> { steps.iter().find(|s| s.name == name).context(name.to_owned()) };

    let cut = step("the east is cut off")?;
    // A few may be spilled to the lost region until its workers are found dead there too.
    let late = cut.late;
    ensure!(late * 20 <= cut.requests, "{late} of {} new requests took more than 2 s", cut.requests);
    // The west keeps the VIP of the service that is bound to the east, for its flows; new ones wait there.
    let served = |step: &Step| step.bound.values().sum::<usize>();
    ensure!(cut.on_dead > 0 && served(cut) * 4 < served(step("baseline")?), "the cut cut something: {cut:?}");
    ensure!(cut.by_worker.contains_key("wa") && cut.by_worker.contains_key("wb"), "the west served");
    let back = step("the east returns")?;
    ensure!(!back.bound.is_empty(), "what is bound to the east is served again");
    Ok(())
}
