//! Tests of the checker with probes and passive failures in memory.

use super::*;
use crate::{desired::store::Revision, observed::health::Outcome};
use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
};

#[derive(Default)]
pub(super) struct Memory(Mutex<BTreeMap<&'static str, Vec<u8>>>);

impl Local for Memory {
    fn load(
        &self,
        key: &'static str,
    ) -> BoxFuture<'_, Result<Option<Vec<u8>>, crate::desired::store::StoreError>> {
        Box::pin(async move { Ok(self.0.lock().unwrap().get(key).cloned()) })
    }
    fn save(
        &self,
        key: &'static str,
        value: Vec<u8>,
    ) -> BoxFuture<'_, Result<(), crate::desired::store::StoreError>> {
        self.0.lock().unwrap().insert(key, value);
        Box::pin(async { Ok(()) })
    }
}

pub(super) fn stored(backends: usize, check: &str) -> Stored {
    let all: serde_json::Map<_, _> = (0..backends)
        .map(|i| {
            (format!("b{i}"), serde_json::json!({ "address": format!("10.1.{}.{}", i / 250, i % 250 + 1) }))
        })
        .collect();
    let health: serde_json::Value = serde_json::from_str(check).unwrap();
    let desired = serde_json::json!({"services": {"s": {
        "vip": "10.0.0.1", "port": 80, "protocol": "tcp", "health": health, "backends": all}}});
    let revision =
        Revision { number: 1, author: String::new(), time_ms: 0, message: String::new(), summary: None };
    Stored { revision, desired: Arc::new(serde_json::from_value(desired).unwrap()) }
}

pub(super) fn id(backend: &str) -> BackendId {
    BackendId { service: "s".parse().unwrap(), backend: backend.parse().unwrap() }
}

pub(super) fn outcome(is_up: bool, why: &str) -> ProbeStep {
    ProbeStep::Done(if is_up { Outcome::Passed("fine".to_owned()) } else { Outcome::Failed(why.to_owned()) })
}

pub(super) async fn next(verdicts: &mut mpsc::Receiver<(BackendId, Health)>) -> (String, Health) {
    let (id, health) = verdicts.recv().await.unwrap();
    (id.backend.to_string(), health)
}

#[tokio::test(start_paused = true)]
async fn verdicts_follow_probes_and_survive_a_restart() {
    let up = Arc::new(Mutex::new(true));
    let probe_up = up.clone();
    let prober: Prober = Arc::new(move |_| {
        let up = *probe_up.lock().unwrap();
        Box::pin(async move { outcome(up, "connection refused") })
    });
    let local = Arc::new(Memory::default());
    let state = watch::Sender::new(stored(1, r#"{"kind":"tcp","interval_ms":1000,"jitter_percent":0}"#));
    let (tx, mut rx) = mpsc::channel(100);
    let book = Checker::restore(&*local).await;
    let checker = Checker::new(book.clone(), 10, prober.clone(), tx);
    let running = tokio::spawn(checker.run(state.subscribe(), local.clone()));
    assert_eq!(next(&mut rx).await, ("b0".into(), Health::Unknown));
    let start = Instant::now();
    assert_eq!(next(&mut rx).await, ("b0".into(), Health::Healthy));
    assert!(start.elapsed() <= Duration::from_millis(210), "a new backend waits {:?}", start.elapsed());
    *up.lock().unwrap() = false;
    let start = Instant::now();
    assert_eq!(next(&mut rx).await, ("b0".into(), Health::Unhealthy));
    let took = start.elapsed();
    assert!(took > Duration::from_millis(2_000) && took <= Duration::from_millis(3_100), "{took:?}");
    let entry = book.get(&id("b0")).unwrap();
    assert_eq!(entry.last.unwrap().reason, "connection refused");
    let changes: Vec<_> = entry.history.iter().map(|t| (t.from, t.to, t.reason.as_str())).collect();
    assert_eq!(
        changes,
        [
            (Health::Unknown, Health::Healthy, "fine"),
            (Health::Healthy, Health::Unhealthy, "connection refused")
        ]
    );
    tokio::time::sleep(Duration::from_secs(1)).await;
    running.abort();

    let (tx, mut rx) = mpsc::channel(100);
    let book = Checker::restore(&*local).await;
    assert_eq!(book.get(&id("b0")).unwrap().history.len(), 2);
    tokio::spawn(Checker::new(book, 10, prober, tx).run(state.subscribe(), local));
    assert_eq!(next(&mut rx).await, ("b0".into(), Health::Unhealthy));
    *up.lock().unwrap() = true;
    assert_eq!(next(&mut rx).await, ("b0".into(), Health::Healthy));
}

#[tokio::test(start_paused = true)]
async fn probes_are_bounded_and_follow_the_desired_state() {
    let (flying, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (f, m) = (flying.clone(), most.clone());
    let prober: Prober = Arc::new(move |_| {
        let (f, m) = (f.clone(), m.clone());
        Box::pin(async move {
            m.fetch_max(f.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(Duration::from_millis(50)).await;
            f.fetch_sub(1, Ordering::SeqCst);
            outcome(true, "")
        })
    });
    let check = r#"{"kind":"tcp","interval_ms":1000}"#;
    let state = watch::Sender::new(stored(200, check));
    let (tx, mut rx) = mpsc::channel(10_000);
    let book = Arc::new(HealthRegistry::default());
    let checker = Checker::new(book.clone(), 7, prober, tx);
    tokio::spawn(checker.run(state.subscribe(), Arc::new(Memory::default())));
    let mut healthy = 0;
    while healthy < 200 {
        if next(&mut rx).await.1 == Health::Healthy {
            healthy += 1;
        }
    }
    assert_eq!(most.load(Ordering::SeqCst), 7);
    state.send_replace(stored(3, check));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(book.read(|all| all.len()), 3);
    let counts = |book: &HealthRegistry| book.read(|all| all.values().map(|e| e.successes).sum::<u64>());
    let before = counts(&book);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let probes = counts(&book) - before;
    assert!((25..=35).contains(&probes), "{probes} probes in 10 s of 3 backends");
    state.send_replace(stored(3, r#"{"kind":"none"}"#));
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = counts(&book);
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(counts(&book), before);
    assert!(book.read(|all| all.values().all(|e| e.health == Health::Healthy)));
}

/// Passive failures of one worker.
#[derive(Default)]
struct Counted(AtomicU32);

impl PassiveSource for Counted {
    fn signs(&self, _: &lb_common::Address) -> lb_common::passive::PassiveFailures {
        lb_common::passive::PassiveFailures { unreachable: self.0.load(Ordering::SeqCst), refused: 0 }
    }
}

/// A checker of one healthy backend that is probed every ten seconds.
struct Slow {
    up: Arc<AtomicBool>,
    signs: Arc<Counted>,
    book: Arc<HealthRegistry>,
    verdicts: mpsc::Receiver<(BackendId, Health)>,
    _state: watch::Sender<Stored>,
}

impl Slow {
    async fn start(more: &str) -> Self {
        let up = Arc::new(AtomicBool::new(true));
        let is_up = up.clone();
        let prober: Prober = Arc::new(move |_| {
            let up = is_up.load(Ordering::SeqCst);
            Box::pin(async move { outcome(up, "no answer") })
        });
        let check = format!(r#"{{"kind":"tcp","interval_ms":10000,"jitter_percent":0{more}}}"#);
        let (tx, verdicts) = mpsc::channel(100);
        let (book, signs) = (Arc::new(HealthRegistry::default()), Arc::new(Counted::default()));
        let state = watch::Sender::new(stored(1, &check));
        let checker = Checker::new(book.clone(), 10, prober, tx).with_passive(signs.clone());
        tokio::spawn(checker.run(state.subscribe(), Arc::new(Memory::default())));
        let mut slow = Self { up, signs, book, verdicts, _state: state };
        while next(&mut slow.verdicts).await.1 != Health::Healthy {}
        // Just after a probe: the next one is far off.
        tokio::time::sleep(Duration::from_millis(300)).await;
        slow
    }

    fn entry(&self) -> HealthEntry {
        self.book.get(&id("b0")).unwrap()
    }

    /// Lets the backend die, with passive failures if `seen`; returns the time until the verdict changed.
    async fn die(&mut self, seen: bool) -> Duration {
        self.up.store(false, Ordering::SeqCst);
        let start = Instant::now();
        loop {
            tokio::select! {
                (_, health) = next(&mut self.verdicts) => {
                    assert_eq!(health, Health::Unhealthy);
                    return start.elapsed();
                }
                () = tokio::time::sleep(Duration::from_millis(50)) => {
                    self.signs.0.fetch_add(u32::from(seen), Ordering::SeqCst);
                }
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn passive_failures_trigger_probes_which_decide() {
    let mut slow = Slow::start("").await;
    let took = slow.die(true).await;
    // Three probes, as usual, but a second apart.
    assert!(took > Duration::from_secs(2) && took < Duration::from_millis(2_500), "{took:?}");
    let entry = slow.entry();
    let last = entry.history.back().unwrap();
    assert!(
        last.reason.starts_with("no answer; probed early: ") && last.reason.contains("unreachable"),
        "{}",
        last.reason
    );
    assert_eq!((entry.passive.early, entry.passive.refuted, entry.failures), (1, 0, 3));
    assert!(entry.passive.unreachable > 30 && entry.passive.refused == 0, "{:?}", entry.passive);
    // An unhealthy backend is not probed early.
    let before = entry.failures;
    for _ in 0..100 {
        slow.signs.0.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let entry = slow.entry();
    assert!(entry.failures <= before + 1 && entry.passive.early == 1, "{entry:?}");
    // Failures from before the recovery do not count.
    slow.up.store(true, Ordering::SeqCst);
    while next(&mut slow.verdicts).await.1 != Health::Healthy {}
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((slow.entry().passive.early, slow.entry().health), (1, Health::Healthy));
    let took = slow.die(true).await;
    assert!(took > Duration::from_secs(2) && took < Duration::from_millis(2_500), "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn without_passive_failures_detection_takes_longer() {
    for (more, seen) in [("", false), (r#","signs":false"#, true)] {
        let mut slow = Slow::start(more).await;
        let took = slow.die(seen).await;
        assert!(took > Duration::from_secs(29), "{took:?}");
        assert_eq!(slow.entry().passive, Default::default());
        assert_eq!(slow.entry().history.back().unwrap().reason, "no answer");
    }
}

#[tokio::test(start_paused = true)]
async fn forged_failures_cost_probes_but_no_verdict() {
    let mut slow = Slow::start("").await;
    let before = slow.entry().successes;
    for _ in 0..3_000 {
        slow.signs.0.fetch_add(7, Ordering::SeqCst);
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    let entry = slow.entry();
    assert_eq!((entry.health, entry.failures), (Health::Healthy, 0));
    assert!(entry.passive.early >= 5 && entry.passive.early <= 12, "{:?}", entry.passive);
    assert_eq!(entry.passive.refuted, entry.passive.early);
    // In five minutes: one probe every ten seconds, plus the early ones.
    let probes = entry.successes - before;
    assert!((28..=44).contains(&probes), "{probes}");
    assert!(slow.verdicts.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn the_verdict_of_a_removed_backend_is_taken_back() {
    let prober: Prober = Arc::new(|_| Box::pin(async { outcome(true, "fine") }));
    let check = r#"{"kind":"tcp","interval_ms":1000}"#;
    let (local, state) = (Arc::new(Memory::default()), watch::Sender::new(stored(2, check)));
    let (tx, mut rx) = mpsc::channel(100);
    let running = tokio::spawn(
        Checker::new(Checker::restore(&*local).await, 10, prober.clone(), tx)
            .run(state.subscribe(), local.clone()),
    );
    let mut known = BTreeMap::new();
    while known.values().filter(|health| **health == Health::Healthy).count() < 2 {
        let (backend, health) = next(&mut rx).await;
        known.insert(backend, health);
    }
    state.send_replace(stored(1, check));
    assert_eq!(next(&mut rx).await, ("b1".into(), Health::Unknown));
    tokio::time::sleep(Duration::from_secs(2)).await;
    while let Ok((id, _)) = rx.try_recv() {
        assert_eq!(id.backend.as_str(), "b0", "no verdict of a removed backend follows");
    }

    // Whoever knows of verdicts from before a restart is told which of them are void.
    running.abort();
    let (tx, mut rx) = mpsc::channel(100);
    let state = watch::Sender::new(Stored { desired: Arc::default(), ..stored(0, check) });
    let book = Checker::restore(&*local).await;
    assert!(book.get(&id("b0")).is_some(), "saved before the restart");
    tokio::spawn(Checker::new(book.clone(), 10, prober, tx).run(state.subscribe(), local));
    assert_eq!(next(&mut rx).await, ("b0".into(), Health::Unknown));
    assert!(book.get(&id("b0")).is_none());
}

#[tokio::test(start_paused = true)]
async fn what_this_host_lacks_changes_no_verdict() {
    let state_of = Arc::new(Mutex::new("up"));
    let now = state_of.clone();
    let prober: Prober = Arc::new(move |_| {
        let outcome = match *now.lock().unwrap() {
            "up" => outcome(true, ""),
            "down" => outcome(false, "connection refused"),
            _ => ProbeStep::Done(Outcome::NotProbed(Obstacle {
                kind: ObstacleKind::FileDescriptors,
                what: "too many open files".to_owned(),
            })),
        };
        Box::pin(async move { outcome })
    });
    let state = watch::Sender::new(stored(1, r#"{"kind":"tcp","interval_ms":1000,"fall":3}"#));
    let (tx, mut rx) = mpsc::channel(100);
    let book = Arc::new(HealthRegistry::default());
    let checker = Checker::new(book.clone(), 10, prober, tx);
    tokio::spawn(checker.run(state.subscribe(), Arc::new(Memory::default())));
    while next(&mut rx).await.1 != Health::Healthy {}
    let set = |to: &'static str| *state_of.lock().unwrap() = to;
    // Two failures, then a minute without descriptors, then one failure: three in a row, which count.
    set("down");
    while book.get(&id("b0")).unwrap().failures < 2 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    set("no descriptors");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let entry = book.get(&id("b0")).unwrap();
    assert_eq!((entry.health, entry.failures), (Health::Healthy, 2));
    assert!(rx.try_recv().is_err(), "no verdict");
    let obstacle = entry.not_probed.unwrap();
    assert_eq!(obstacle.reason, ObstacleKind::FileDescriptors);
    assert!((55..=65).contains(&obstacle.count), "{obstacle:?}");
    let counted = book.counts().not_probed[0];
    assert_eq!(counted, obstacle.count);
    set("down");
    assert_eq!(next(&mut rx).await, ("b0".into(), Health::Unhealthy));
    let entry = book.get(&id("b0")).unwrap();
    assert_eq!((entry.failures, entry.not_probed), (3, None), "checks can be made again");
    // Nor is an unhealthy backend found healthy.
    set("no descriptors");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(book.get(&id("b0")).unwrap().health, Health::Unhealthy);
}

/// A few hundred workers that answer nothing hold a probe for the whole timeout each. The others must not wait for them.
#[tokio::test(start_paused = true)]
async fn silent_backends_do_not_delay_the_checks_of_others() {
    let timeout = Duration::from_secs(2);
    let dead = Arc::new(AtomicBool::new(false));
    let is_dead = dead.clone();
    let prober: Prober = Arc::new(move |target: ProbeTarget| {
        let dead = is_dead.load(Ordering::SeqCst);
        Box::pin(async move {
            if target.address.port() == 81 {
                tokio::time::sleep(target.timeout).await;
                return outcome(false, "no connection");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
            outcome(!dead, "connection refused")
        })
    });
    let mut all = stored(20, r#"{"kind":"tcp","interval_ms":1000,"timeout_ms":2000,"fall":3}"#);
    let silent = stored(600, r#"{"kind":"tcp","interval_ms":1000,"timeout_ms":2000,"port":81}"#);
    let mut desired = (*all.desired).clone();
    desired.services.insert("a".parse().unwrap(), silent.desired.services.values().next().unwrap().clone());
    all.desired = Arc::new(desired);
    let state = watch::Sender::new(all);
    let (tx, mut rx) = mpsc::channel(100_000);
    let book = Arc::new(HealthRegistry::default());
    let checker = Checker::new(book.clone(), 64, prober, tx);
    tokio::spawn(checker.run(state.subscribe(), Arc::new(Memory::default())));
    let mut healthy = 0;
    while healthy < 20 {
        healthy += usize::from(rx.recv().await.unwrap().1 == Health::Healthy);
    }
    // By now every silent one has been probed.
    tokio::time::sleep(Duration::from_secs(120)).await;
    while rx.try_recv().is_ok() {}
    dead.store(true, Ordering::SeqCst);
    let start = Instant::now();
    let mut found = 0;
    while found < 20 {
        let (id, health) = rx.recv().await.unwrap();
        found += usize::from(id.service.to_string() == "s" && health == Health::Unhealthy);
    }
    let took = start.elapsed();
    assert!(took <= Duration::from_millis(3_400), "found after {took:?}, as without silent ones");
    // 16 of 64 permits are theirs: each is probed every 75 s, which is said.
    let late = book.read(|all| all.values().filter(|e| e.not_probed.is_some()).count());
    assert!(late > 500, "{late}");
    let counts = book.counts();
    assert!(counts.lateness.count() > 1_000 && counts.not_probed[6] > 500, "{counts:?}");
    assert!(timeout * 600 / 16 >= Duration::from_secs(75));
}
