//! The promises, one function each.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use lb_userspace::desired::{
    model::{Desired, generate},
    store::{
        Claim, Retire, Store, StoreError, Stored,
        backup::{self, Backup},
        since,
    },
};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{Fixture, commit, full, state};

/// How long something that happens by itself may take.
const SOON: Duration = Duration::from_secs(10);

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) -> Result<()> {
    let until = tokio::time::Instant::now() + SOON;
    while !holds() {
        ensure!(tokio::time::Instant::now() < until, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

fn refused<T: std::fmt::Debug>(result: Result<T, StoreError>) -> Result<StoreError> {
    match result {
        Ok(value) => bail!("not refused: {value:?}"),
        Err(error) => Ok(error),
    }
}

/// Revisions are numbered, say who and when, outlive the process, and are made on the newest only.
pub async fn revisions_last_and_conflicts_are_told(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    ensure!(store.head().revision.number == 0 && *store.head().desired == Desired::default());
    let mut watch = store.watch();
    let one = state(&[("a", 1, &[1, 2]), ("b", 2, &[])]);
    let first = store.commit(commit(0, one.clone())).await?;
    ensure!(first.revision.number == 1 && first.desired == one);
    tokio::time::timeout(SOON, watch.changed()).await??;
    ensure!(watch.borrow_and_update().desired == one);
    let two = state(&[("b", 3, &[1])]);
    let second = store.commit(commit(1, two.clone())).await?;
    let late = refused(store.commit(commit(1, one.clone())).await)?;
    ensure!(matches!(late, StoreError::Conflict { expected: 1, found: 2 }), "{late}");
    ensure!(store.head() == second);
    drop((store, watch));

    let store = fixture.open(100).await?;
    ensure!(store.head() == second, "{:?}", store.head());
    ensure!(store.get(1).await?.desired == one && store.get(0).await?.desired == Arc::default());
    let told: Vec<_> = store.history(None, 10).await?;
    let told: Vec<_> =
        told.iter().map(|r| (r.number, r.author.as_str(), r.message.as_str(), r.time_ms)).collect();
    ensure!(told == [(2, "ann", "from 1", 2_000), (1, "ann", "from 0", 1_000)], "{told:?}");
    ensure!(store.history(Some(2), 10).await?.len() == 1 && store.history(None, 1).await?.len() == 1);
    let error = refused(store.get(9).await)?.to_string();
    ensure!(error == "no revision 9; available: 1 to 2", "{error}");
    ensure!(store.link().borrow().connected && !store.about().await.id.is_empty());
    Ok(())
}

/// Eight writers, on two hosts where the engine has those: each change is there in the end.
pub async fn writers_at_once_do_not_lose_each_other(fixture: &impl Fixture) -> Result<()> {
    let one = fixture.open(100).await?;
    let two = if fixture.is_shared() { fixture.open(100).await? } else { one.clone() };
    let writers = (0..8u16).map(|i| {
        let store = if i % 2 == 0 { one.clone() } else { two.clone() };
        tokio::spawn(async move {
            let mut conflicts = 0;
            for round in 0..3u16 {
                loop {
                    let head = store.head();
                    let mut desired = (*head.desired).clone();
                    let name = format!("s{i}-{round}");
                    desired.services.extend(state(&[(&name, i + 1, &[1])]).services.clone());
                    match store.commit(commit(head.revision.number, Arc::new(desired))).await {
                        Ok(_) => break,
                        Err(StoreError::Conflict { .. }) => conflicts += 1,
                        Err(error) => bail!("{error}"),
                    }
                }
            }
            Ok(conflicts)
        })
    });
    for writer in futures_util::future::join_all(writers).await {
        writer??;
    }
    eventually("both see all 24 revisions", || {
        [&one, &two].iter().all(|s| s.head().revision.number == 24 && s.head().desired.services.len() == 24)
    })
    .await
}

/// Only as many revisions are kept as were asked for, and those are whole.
pub async fn old_revisions_are_forgotten(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(3).await?;
    for i in 0..10u16 {
        store.commit(commit(i.into(), state(&[("kept", 1, &[1]), ("changing", 100 + i, &[])]))).await?;
    }
    let check = async |store: &dyn Store| -> Result<()> {
        let numbers: Vec<_> = store.history(None, 100).await?.iter().map(|r| r.number).collect();
        ensure!(numbers == [10, 9, 8], "{numbers:?}");
        ensure!(store.get(8).await?.desired == state(&[("kept", 1, &[1]), ("changing", 107, &[])]));
        ensure!(*store.head().desired == *state(&[("kept", 1, &[1]), ("changing", 109, &[])]));
        Ok(())
    };
    check(&*store).await?;
    drop(store);
    let store = fixture.open(3).await?;
    check(&*store).await?;
    for gone in [0, 1, 7] {
        let error = refused(store.get(gone).await)?;
        ensure!(matches!(error, StoreError::NoRevision { oldest: 8, newest: 10, .. }), "{error}");
    }
    Ok(())
}

/// The author's reason and what changed are both kept; a service's changes can be listed, in pieces.
pub async fn changes_are_told_by_service(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    let steps: [&[(&str, u16, &[u32])]; 6] = [
        &[("a", 1, &[1])],
        &[("a", 1, &[1]), ("b", 2, &[])],
        &[("a", 1, &[1, 2]), ("b", 2, &[])],
        &[("b", 2, &[])],
        &[("b", 3, &[])],
        &[("a", 9, &[]), ("b", 3, &[])],
    ];
    for (i, services) in steps.into_iter().enumerate() {
        let summary = Some(format!("step {i}"));
        store
            .commit(lb_userspace::desired::store::Commit { summary, ..commit(i as u64, state(services)) })
            .await?;
    }
    drop(store);
    let store = fixture.open(100).await?;
    let head = store.head().revision;
    ensure!(head.change() == "step 5" && head.reason() == Some("from 5"), "{head:?}");
    let found = async |name: &str, before, scan| -> Result<(Vec<u64>, Option<u64>)> {
        let (found, next) = store.history_of(name.parse()?, before, scan).await?;
        ensure!(found.iter().all(|r| r.summary.is_some()), "{found:?}");
        Ok((found.iter().map(|r| r.number).collect(), next))
    };
    for (name, expected) in [("a", vec![6, 4, 3, 1]), ("b", vec![5, 2]), ("none", vec![])] {
        ensure!(found(name, None, 100).await? == (expected.clone(), None), "{name}");
        for scan in 1..7 {
            let (mut all, mut before) = (Vec::new(), None);
            loop {
                let (some, next) = found(name, before, scan).await?;
                all.extend(some);
                match next {
                    Some(next) => before = Some(next),
                    None => break,
                }
            }
            ensure!(all == expected, "{name}, {scan} at a time: {all:?}");
        }
    }
    Ok(())
}

/// What may come after `before`: other services, one field of the state as it is elsewhere, or all of it.
fn random_state(random: &mut StdRng, before: &Desired) -> Arc<Desired> {
    let all = random.random();
    let Desired { services, regions, guard } = generate::state(random.random(), all);
    let mut desired = before.clone();
    match random.random_range(0..5) {
        0 => desired = Desired { services, regions, guard },
        1 => desired.regions = regions,
        2 => desired.guard = guard,
        3 => {
            let name = format!("s{}", random.random_range(0..6));
            desired.services.retain(|n, _| n.as_str() != name);
        }
        _ => desired.services.extend(services.into_iter().take(2)),
    }
    Arc::new(desired)
}

/// A drain of a region, a deny list and whatever else a state has: as it was for whoever opens the store later, also
/// under its number.
pub async fn every_field_outlives_the_process(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    let states =
        [full(1), Arc::new(Desired { services: full(1).services.clone(), ..(*full(2)).clone() }), full(3)];
    for (i, state) in states.iter().enumerate() {
        store.commit(commit(i as u64, state.clone())).await?;
    }
    drop(store);
    let store = fixture.open(100).await?;
    ensure!(store.head().desired == states[2], "{:?}\n{:?}", store.head().desired, states[2]);
    for (i, state) in states.iter().enumerate() {
        ensure!(store.get(i as u64 + 1).await?.desired == *state, "revision {}", i + 1);
    }
    Ok(())
}

/// A random history, also with states far larger than the changes; every revision is as it was, also for
/// whoever opens the store later.
pub async fn any_history_reads_back_as_it_was_written(fixture: &impl Fixture) -> Result<()> {
    let seed = rand::rng().random::<u64>();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut store = fixture.open(1_000).await?;
    let weights = vec![1; 400];
    let large = state(&[("large", 99, &weights)]);
    let mut written: BTreeMap<u64, Arc<Desired>> = BTreeMap::from([(0, Arc::default())]);
    for i in 0..120 {
        let before = written.last_key_value().map(|(_, d)| d.clone()).context("there is revision 0")?;
        let mut desired = (*random_state(&mut random, &before)).clone();
        if i == 10 {
            desired.services.extend(large.services.clone());
        }
        let desired = Arc::new(desired);
        written.insert(i + 1, desired.clone());
        store.commit(commit(i, desired)).await?;
        if i % 40 == 39 {
            drop(store);
            store = fixture.open(1_000).await?;
        }
    }
    for (number, desired) in &written {
        let found = store.get(*number).await?;
        ensure!(found.revision.number == *number && found.desired == *desired, "revision {number}");
    }
    Ok(())
}

/// A thousand services, 3 MB of JSON: one revision like any other.
pub async fn a_large_state_is_one_revision(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    let weights = [1; 40];
    let names: Vec<String> = (0..1_000).map(|i| format!("service-{i}")).collect();
    let all: Vec<_> =
        names.iter().enumerate().map(|(i, n)| (n.as_str(), i as u16 + 1, &weights[..])).collect();
    let large = state(&all);
    ensure!(serde_json::to_vec(&*large)?.len() > 2_000_000, "not large");
    store.commit(commit(0, large.clone())).await?;
    let mut changed = (*large).clone();
    changed.services.pop_first();
    let changed = Arc::new(changed);
    store.commit(commit(1, changed.clone())).await?;
    drop(store);
    let store = fixture.open(100).await?;
    ensure!(*store.head().desired == *changed && *store.get(1).await?.desired == *large);
    Ok(())
}

/// Numbers, authors and times stay; what is in a store is never mixed with an import.
pub async fn an_import_brings_all_revisions_and_only_into_an_empty_store(
    fixture: &impl Fixture,
) -> Result<()> {
    let from = fixture.open(4).await?;
    for i in 0..9u16 {
        from.commit(commit(i.into(), full(i.into()))).await?;
    }
    let all = backup::revisions(&*from).await?;
    ensure!(all.iter().all(|s| s.desired == full(s.revision.number - 1)), "{all:?}");
    ensure!(all.iter().map(|s| s.revision.number).eq(6..=9), "{all:?}");
    let to = fixture.open_other().await?;
    to.import(None, all.clone()).await?;
    ensure!(to.head() == from.head() && backup::revisions(&*to).await? == all);
    let next = to.commit(commit(9, state(&[]))).await?;
    ensure!(next.revision.number == 10);
    let error = refused(to.import(None, all).await)?;
    ensure!(matches!(error, StoreError::NotEmpty { count: 10, .. }), "{error}");
    Ok(())
}

/// Through a file's bytes.
pub async fn a_backup_restores_elsewhere(fixture: &impl Fixture) -> Result<()> {
    let from = fixture.open(100).await?;
    for i in 0..20u16 {
        from.commit(commit(i.into(), full(i.into()))).await?;
    }
    let bytes = Backup::of(&*from, 5).await?.to_bytes()?;
    let read = Backup::parse("f", &bytes)?;
    ensure!(read.store == from.about().await.id);
    let to = fixture.open_other().await?;
    to.import(Some("0123456789abcdef".into()), read.stored("f")?).await?;
    for number in 1..=20 {
        let (there, here) = (to.get(number).await?, from.get(number).await?);
        ensure!(there == here && there.desired == full(number - 1), "revision {number}");
    }
    Ok(())
}

/// After a migration, also for whoever opens it later; until it is taken back.
pub async fn what_has_moved_takes_no_changes(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    store.commit(commit(0, state(&[("a", 1, &[])]))).await?;
    let error = refused(store.retire(Retire::Back).await)?;
    ensure!(matches!(error, StoreError::NotMoved { .. }), "{error}");
    let there = "etcd://there:2379/lb".to_owned();
    store.retire(Retire::Moving(there.clone())).await?;
    let error = refused(store.commit(commit(1, state(&[]))).await)?;
    ensure!(matches!(error, StoreError::Moving { .. }), "{error}");
    store.retire(Retire::Moved(there.clone())).await?;
    for error in [
        refused(store.commit(commit(1, state(&[]))).await)?,
        refused(store.retire(Retire::Moving("file:///elsewhere".into())).await)?,
    ] {
        let text = error.to_string();
        ensure!(
            matches!(error, StoreError::Moved { .. }) && text.contains(&format!("migrated to {there}")),
            "{text}"
        );
        ensure!(text.contains("`lbctl store unretire --yes`"), "{text}");
    }
    let moved = |store: &dyn Store| store.link().borrow().moved.clone();
    ensure!(moved(&*store).as_ref() == Some(&there), "{:?}", moved(&*store));
    drop(store);
    let store = fixture.open(100).await?;
    ensure!(moved(&*store).as_ref() == Some(&there), "{:?}", moved(&*store));
    let error = refused(store.commit(commit(1, state(&[]))).await)?;
    ensure!(matches!(error, StoreError::Moved { .. }), "{error}");
    ensure!(store.head().revision.number == 1);
    store.retire(Retire::Back).await?;
    ensure!(moved(&*store).is_none(), "{:?}", moved(&*store));
    store.commit(commit(1, state(&[("a", 2, &[])]))).await?;
    drop(store);
    let store = fixture.open(100).await?;
    ensure!(moved(&*store).is_none(), "{:?}", moved(&*store));
    store.commit(commit(2, state(&[("a", 3, &[])]))).await?;
    Ok(())
}

/// Whoever dies while he copies the data elsewhere leaves a store in use, as soon as others can tell.
pub async fn a_migration_that_is_cut_short_leaves_the_store_in_use(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    store.commit(commit(0, state(&[("a", 1, &[])]))).await?;
    store.retire(Retire::Moving("file:///nowhere".into())).await?;
    drop(store);
    let store = fixture.open(100).await?;
    let until = tokio::time::Instant::now() + Duration::from_secs(30);
    loop {
        match store.commit(commit(1, state(&[("a", 2, &[])]))).await {
            Ok(_) => return Ok(()),
            Err(StoreError::Moving { .. }) if tokio::time::Instant::now() < until => {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            Err(error) => bail!("{error}"),
        }
    }
}

/// For those who must know what tables were made from lately.
pub async fn what_was_in_force_at_a_time_is_found(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    for i in 0..10u16 {
        store.commit(commit(i.into(), state(&[("a", i + 1, &[])]))).await?;
    }
    let numbers = |found: Vec<Stored>| -> Vec<u64> { found.iter().map(|s| s.revision.number).collect() };
    ensure!(numbers(since(&*store, 7_500, 100).await?) == [7, 8, 9, 10]);
    ensure!(numbers(since(&*store, 7_500, 2).await?) == [9, 10]);
    ensure!(numbers(since(&*store, 99_000, 100).await?) == [10]);
    ensure!(numbers(since(&*store, 0, 100).await?) == (0..=10).collect::<Vec<_>>());
    Ok(())
}

/// What one host tells, all see.
pub async fn values_are_told_and_taken_back(fixture: &impl Fixture) -> Result<()> {
    let one = fixture.open(100).await?;
    let two = if fixture.is_shared() { fixture.open(100).await? } else { one.clone() };
    let seen = |key: &str| two.published().borrow().get(key).cloned();
    one.publish("hosts/one", Some(b"1".to_vec()));
    one.publish("regions/x/one", Some(b"2".to_vec()));
    eventually("both values are seen", || seen("hosts/one").is_some() && seen("regions/x/one").is_some())
        .await?;
    one.publish("hosts/one", Some(b"3".to_vec()));
    eventually("the new value is seen", || seen("hosts/one") == Some(b"3".to_vec())).await?;
    one.publish("hosts/one", None);
    eventually("it is gone", || seen("hosts/one").is_none()).await?;
    ensure!(seen("regions/x/one") == Some(b"2".to_vec()));
    Ok(())
}

/// A record of a host outlives its report, and only that of a host that is gone can be removed.
pub async fn members_stay_until_they_are_forgotten(fixture: &impl Fixture) -> Result<()> {
    let one = fixture.open(100).await?;
    let two = if fixture.is_shared() { fixture.open(100).await? } else { one.clone() };
    let seen = |key: &str| two.published().borrow().get(key).cloned();
    one.join("a", "first");
    one.keep_member("a", b"1".to_vec());
    one.publish("hosts/a", Some(b"1".to_vec()));
    eventually("record and report are seen", || seen("hosts/a").is_some() && seen("members/a").is_some())
        .await?;
    let lives = two.forget_member("a".to_owned()).await;
    ensure!(matches!(lives, Err(StoreError::MemberLives { .. })), "{lives:?}");
    one.publish("hosts/a", None);
    eventually("it is gone", || seen("hosts/a").is_none()).await?;
    ensure!(seen("members/a") == Some(b"1".to_vec()));
    two.forget_member("a".to_owned()).await?;
    eventually("it is forgotten", || seen("members/a").is_none()).await?;
    let unknown = two.forget_member("a".to_owned()).await;
    ensure!(matches!(unknown, Err(StoreError::NoMember { .. })), "{unknown:?}");
    Ok(())
}

fn claim(name: &str, holder: &str, ttl_s: u64, token: Option<String>) -> Claim {
    let (name, holder) = (name.to_owned(), holder.to_owned());
    Claim { name, holder, reason: "drain".to_owned(), ttl: Duration::from_secs(ttl_s), token }
}

/// Two regions are never drained at once.
pub async fn a_lock_has_one_holder(fixture: &impl Fixture) -> Result<()> {
    let one = fixture.open(100).await?;
    let two = if fixture.is_shared() { fixture.open(100).await? } else { one.clone() };
    let tries = (0..6).map(|i| {
        let store = if i % 2 == 0 { one.clone() } else { two.clone() };
        tokio::spawn(async move { store.lock(claim("rollout", &format!("h{i}"), 60, None)).await })
    });
    let mut held = Vec::new();
    for result in futures_util::future::join_all(tries).await {
        match result? {
            Ok(lock) => held.push(lock),
            Err(error @ StoreError::Held { .. }) => ensure!(error.to_string().contains("drain"), "{error}"),
            Err(error) => bail!("{error}"),
        }
    }
    ensure!(held.len() == 1, "{held:?}");
    let lock = held.remove(0);
    let token = lock.token.clone().context("whoever has it gets a token")?;
    let shown = two.locks().await?;
    ensure!(shown.len() == 1 && shown[0].holder == lock.holder && shown[0].token.is_none(), "{shown:?}");
    ensure!((1..=60).contains(&shown[0].left_s), "{shown:?}");
    // Another name is another lock.
    let other = two.lock(claim("other", "x", 60, None)).await?;
    let renewed = two.lock(claim("rollout", "any", 60, Some(token.clone()))).await?;
    ensure!(renewed.holder == lock.holder && renewed.left_s >= 50, "{renewed:?}");
    let wrong = refused(two.lock(claim("rollout", "any", 60, other.token.clone())).await)?;
    ensure!(matches!(wrong, StoreError::NotHeld { .. }), "{wrong}");
    let wrong = refused(two.unlock("rollout".into(), Some("12ab".into())).await)?;
    ensure!(matches!(wrong, StoreError::NotHeld { .. }), "{wrong}");
    two.unlock("rollout".into(), Some(token)).await?;
    let again = one.lock(claim("rollout", "y", 60, None)).await?;
    // By force, without its token.
    two.unlock("rollout".into(), None).await?;
    ensure!(one.locks().await?.len() == 1 && again.holder == "y");
    let gone = refused(two.unlock("rollout".into(), None).await)?;
    ensure!(matches!(gone, StoreError::NotHeld { .. }), "{gone}");
    Ok(())
}

/// Whoever died with a lock does not hold it for ever.
pub async fn a_lock_runs_out(fixture: &impl Fixture) -> Result<()> {
    let store = fixture.open(100).await?;
    store.lock(claim("rollout", "first", 5, None)).await?;
    let began = tokio::time::Instant::now();
    loop {
        match store.lock(claim("rollout", "second", 5, None)).await {
            Ok(_) => break,
            Err(StoreError::Held { .. }) => tokio::time::sleep(Duration::from_millis(100)).await,
            Err(error) => bail!("{error}"),
        }
        ensure!(began.elapsed() < Duration::from_secs(20), "it never ran out");
    }
    ensure!(began.elapsed() > Duration::from_secs(3), "it ran out after {:?}", began.elapsed());
    Ok(())
}
