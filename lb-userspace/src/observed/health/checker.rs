//! One task per checked backend, following the desired state.
//!
//! All probes share one thread, and begin on a grid of a hundredth of the interval (20 ms at most): on the shared
//! runtime each timer woke a processor, and a second one that looked for work.

use super::{
    EarlyProbe, Entry, HealthRegistry, Probe, ProbeTarget,
    passive::{Hint, LOOK, PassiveSource, Suspicion},
    tunnel::to_address,
    verdict::Verdict,
};
use crate::{
    clock,
    desired::{
        model::{BackendId, Desired, Health, HealthCheck, HealthKind, Name, Service},
        store::{Local, Stored, restored},
    },
};
use futures_util::future::BoxFuture;
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tokio::{
    sync::{Notify, Semaphore, mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior},
};

/// Key of the verdicts in the local store.
const KEY: &str = "health";
/// How long changes are gathered before they are saved.
const SAVE_DELAY: Duration = Duration::from_millis(200);

/// Most coarse grid that probes begin on.
const MOST_COARSE_MS: u32 = 20;

/// Does one probe. [`super::probe`] outside tests.
pub type Prober = Arc<dyn Fn(ProbeTarget) -> BoxFuture<'static, Result<String, String>> + Send + Sync>;

/// How one backend is checked; a change of it restarts the task.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Plan {
    target: ProbeTarget,
    check: HealthCheck,
}

/// Keeps the probes going.
pub struct Checker {
    shared: Arc<Shared>,
    tasks: JoinSet<()>,
    running: BTreeMap<BackendId, Running>,
    /// What `running` follows.
    followed: Arc<Desired>,
    signs: Option<Arc<dyn PassiveSource>>,
    /// Whether anybody wants them.
    heeds_signs: bool,
}

/// One backend.
struct Running {
    plan: Plan,
    /// None if it is not checked.
    task: Option<AbortHandle>,
    /// As the packet programs have it.
    address: lb_common::Address,
    suspicion: Arc<Suspicion>,
}

struct Shared {
    book: Arc<HealthRegistry>,
    verdicts: mpsc::Sender<(BackendId, Health)>,
    permits: Semaphore,
    prober: Prober,
    changed: Notify,
    /// Where the grid of probes begins, see [`Shared::probe_time`].
    began: Instant,
}

impl Checker {
    /// A checker with the verdicts of before the restart. At most `probes` are in flight at once.
    /// Verdicts are sent to `verdicts`: each change, and all known ones when a backend appears.
    pub fn new(
        book: Arc<HealthRegistry>,
        probes: usize,
        prober: Prober,
        verdicts: mpsc::Sender<(BackendId, Health)>,
    ) -> Self {
        let permits = Semaphore::new(probes.max(1));
        let shared = Arc::new(Shared {
            book,
            verdicts,
            permits,
            prober,
            changed: Notify::new(),
            began: Instant::now(),
        });
        Self {
            shared,
            tasks: JoinSet::new(),
            running: BTreeMap::new(),
            followed: Arc::default(),
            signs: None,
            heeds_signs: false,
        }
    }

    /// The same, with probes that are brought forward by what `signs` counts.
    pub fn with_passive(self, signs: Arc<dyn PassiveSource>) -> Self {
        Self { signs: Some(signs), ..self }
    }

    /// Reads the book of before the restart, or an empty one.
    pub async fn restore(local: &dyn Local) -> Arc<HealthRegistry> {
        Arc::new(restored(local, KEY, "last health verdicts", HealthRegistry::restore).await)
    }

    /// Writes the book down for the next start.
    ///
    /// # Errors
    /// The store cannot be written.
    pub async fn save(
        book: &HealthRegistry,
        local: &dyn Local,
    ) -> Result<(), crate::desired::store::StoreError> {
        local.save(KEY, book.save()).await
    }

    /// Follows the desired state until its sender is gone.
    pub async fn run(mut self, mut desired: watch::Receiver<Stored>, local: Arc<dyn Local>) {
        let saver = tokio::spawn(save(self.shared.clone(), local));
        let mut looks = tokio::time::interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_news = true;
        loop {
            if is_news {
                let state = desired.borrow_and_update().desired.clone();
                self.follow(&state).await;
                let heeds = |r: &Running| r.task.is_some() && r.plan.check.signs;
                self.heeds_signs = self.signs.is_some() && self.running.values().any(heeds);
            }
            is_news = tokio::select! {
                changed = desired.changed() => match changed {
                    Ok(()) => true,
                    Err(_) => break,
                },
                // Tasks only end by being stopped; this keeps the set from growing.
                Some(_) = self.tasks.join_next() => false,
                _ = looks.tick(), if self.heeds_signs => {
                    self.look();
                    false
                }
            };
        }
        self.tasks.shutdown().await;
        saver.abort();
    }

    /// Looks for signs of dead workers.
    fn look(&self) {
        let Some(source) = &self.signs else { return };
        let now = Instant::now();
        for (id, running) in &self.running {
            if running.task.is_none() || !running.plan.check.signs {
                continue;
            }
            let signs = source.signs(&running.address);
            let (unreachable, refused) = running.suspicion.look(signs, now);
            if (unreachable, refused) != (0, 0) {
                self.shared.book.change(|entries| {
                    if let Some(entry) = entries.get_mut(id) {
                        entry.heard.unreachable += u64::from(unreachable);
                        entry.heard.refused += u64::from(refused);
                    }
                });
            }
        }
    }

    /// Starts, restarts and stops tasks so that they match `desired`. Services that stay as they were are
    /// not looked into.
    async fn follow(&mut self, desired: &Arc<Desired>) {
        let old = std::mem::replace(&mut self.followed, desired.clone());
        let first = self.running.is_empty();
        let changed: BTreeMap<&Name, Option<&Service>> = {
            let gone = old.services.keys().filter(|name| !desired.services.contains_key(*name));
            let new = desired.services.iter().filter(|(name, s)| first || old.services.get(*name) != Some(s));
            gone.map(|name| (name, None)).chain(new.map(|(name, s)| (name, Some(&**s)))).collect()
        };
        let mut plans = BTreeMap::new();
        for (name, service) in &changed {
            if let Some(service) = service {
                plan(name, service, &mut plans);
            }
        }
        for name in changed.keys() {
            for id in ids_of(&self.running, name) {
                if let Some(running) = self.running.get(&id)
                    && plans.get(&id) != Some(&running.plan)
                {
                    running.task.iter().for_each(AbortHandle::abort);
                    self.running.remove(&id);
                }
            }
        }
        self.shared.book.change(|entries| {
            if first {
                // What the last daemon knew of services that are gone by now.
                entries.retain(|id, _| desired.services.contains_key(&id.service));
            }
            for name in changed.keys() {
                for id in ids_of(entries, name) {
                    if !plans.contains_key(&id) {
                        entries.remove(&id);
                    }
                }
            }
        });
        let book = self.shared.book.clone();
        for (id, plan) in plans {
            if self.running.contains_key(&id) {
                continue;
            }
            let address = plan.target.address.ip().to_string();
            let known = book.change(|entries| {
                let entry = entries.entry(id.clone()).or_default();
                // A verdict is about a worker, not about a name.
                if entry.address != address {
                    *entry = Entry { address, ..Entry::default() };
                }
                entry.health
            });
            let suspicion = Arc::new(Suspicion::default());
            let task = if plan.check.kind == HealthKind::None {
                self.shared.settle(&id, Health::Healthy, "not checked").await;
                None
            } else {
                let _ = self.shared.verdicts.send((id.clone(), known)).await;
                let job =
                    watch_backend(self.shared.clone(), id.clone(), plan.clone(), known, suspicion.clone());
                Some(self.tasks.spawn(job))
            };
            self.running
                .insert(id, Running { address: to_address(plan.target.address.ip()), plan, task, suspicion });
        }
    }
}

/// A service's backends in a map of all.
fn ids_of<T>(all: &BTreeMap<BackendId, T>, service: &Name) -> Vec<BackendId> {
    // Names begin with a letter or digit, and of all these 0 is the least.
    let least: Name = "0".parse().expect("a digit is a name");
    let from = all.range(BackendId { service: service.clone(), backend: least }..);
    from.map(|(id, _)| id).take_while(|id| id.service == *service).cloned().collect()
}

/// What is to be checked of a service.
fn plan(service: &Name, s: &Service, plans: &mut BTreeMap<BackendId, Plan>) {
    for (backend, b) in &s.backends {
        let target = ProbeTarget::of(s, b);
        let id = BackendId { service: service.clone(), backend: backend.clone() };
        plans.insert(id, Plan { target, check: s.health.clone() });
    }
}

impl Shared {
    /// When a probe that is due after `wait` begins: with others, at the next line of a grid of a hundredth of the
    /// interval. One wake-up of the processor then does for all of them; the jitter is ten times as wide.
    fn probe_time(&self, wait: Duration, check: &HealthCheck) -> Instant {
        let step_ms = u128::from((check.interval_ms / 100).clamp(1, MOST_COARSE_MS));
        let due_ms = (Instant::now() + wait).duration_since(self.began).as_micros().div_ceil(1_000);
        self.began + Duration::from_millis((due_ms.div_ceil(step_ms) * step_ms) as u64)
    }

    /// Writes a verdict down and tells it, if it is another than before.
    async fn settle(&self, id: &BackendId, health: Health, reason: &str) {
        let turned = self.book.change(|entries| {
            // Gone since: a task that is being stopped has nothing more to say.
            let Some(entry) = entries.get_mut(id) else { return false };
            let turned = entry.health != health;
            if turned {
                entry.turn(health, clock::unix_ms(), reason.to_owned());
            }
            turned
        });
        if turned {
            self.changed.notify_one();
        }
        // Told again even so: whoever listens may have just started.
        let _ = self.verdicts.send((id.clone(), health)).await;
    }

    /// Writes down that a probe is brought forward.
    fn hinted(&self, id: &BackendId, hint: Hint) {
        self.book.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                entry.heard.early += 1;
                entry.heard.last = Some(EarlyProbe { time_ms: clock::unix_ms(), what: hint.to_string() });
            }
        });
    }

    /// Writes down that the probe found nothing wrong.
    fn refuted(&self, id: &BackendId) {
        self.book.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                entry.heard.refuted += 1;
            }
        });
    }

    fn record(&self, id: &BackendId, probe: Probe, damped: Option<u32>) {
        self.book.change(|entries| {
            if let Some(entry) = entries.get_mut(id) {
                let count = if probe.ok { &mut entry.successes } else { &mut entry.failures };
                *count += 1;
                entry.last = Some(probe);
                entry.damped = damped;
            }
        });
    }
}

/// Probes one backend for ever.
async fn watch_backend(
    shared: Arc<Shared>,
    id: BackendId,
    plan: Plan,
    known: Health,
    suspicion: Arc<Suspicion>,
) {
    let (mut verdict, began) = (Verdict::new(known), Instant::now());
    // What its probes were brought forward for, until one of them tells.
    let mut hint: Option<Hint> = None;
    // The first probe comes at a random moment of the first interval, so that they spread.
    let mut wait = verdict.wait(&plan.check, 0.5).mul_f64(rand::random());
    loop {
        let may_hint = hint.is_none() && verdict.health() == Health::Healthy;
        tokio::select! {
            biased;
            heard = suspicion.hint(), if may_hint => {
                tracing::debug!(backend = %id, address = %plan.target.address, signs = %heard, "probed early");
                verdict.suspect();
                shared.hinted(&id, heard);
                hint = Some(heard);
            }
            () = tokio::time::sleep_until(shared.probe_time(wait, &plan.check)) => {}
        }
        let Ok(permit) = shared.permits.acquire().await else { return };
        let start = Instant::now();
        let result = (shared.prober)(plan.target.clone()).await;
        drop(permit);
        let (ok, mut reason) = match result {
            Ok(reason) => (true, reason),
            Err(reason) => (false, reason),
        };
        let took_us = start.elapsed().as_micros() as u64;
        tracing::debug!(backend = %id, address = %plan.target.address, ok, %reason, took_us, "probe");
        let now = began.elapsed();
        let before = verdict.observe(ok, &plan.check, now);
        let needed = verdict.needed(&plan.check, now);
        let damped = (needed > u32::from(plan.check.rise)).then_some(needed);
        shared.record(&id, Probe { time_ms: clock::unix_ms(), ok, reason: reason.clone(), took_us }, damped);
        if ok && hint.take().is_some() {
            suspicion.refute(Instant::now());
            shared.refuted(&id);
        }
        if let Some(from) = before {
            let to = verdict.health();
            let address = plan.target.address;
            suspicion.forget();
            if let Some(hint) = hint.take() {
                reason = format!("{reason}; probed early: {hint}");
            }
            if to == Health::Unhealthy {
                tracing::warn!(backend = %id, %address, ?from, ?to, %reason, "health changed");
            } else {
                tracing::info!(backend = %id, %address, ?from, ?to, %reason, "health changed");
            }
            shared.settle(&id, to, &reason).await;
        }
        wait = verdict.wait(&plan.check, rand::random());
    }
}

/// Saves the book a moment after each change.
async fn save(shared: Arc<Shared>, local: Arc<dyn Local>) {
    loop {
        shared.changed.notified().await;
        tokio::time::sleep(SAVE_DELAY).await;
        if let Err(error) = Checker::save(&shared.book, &*local).await {
            tracing::error!(%error, "health verdicts cannot be saved");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::store::Revision;
    use std::sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering},
    };

    #[derive(Default)]
    struct Memory(Mutex<BTreeMap<&'static str, Vec<u8>>>);

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

    fn stored(backends: usize, check: &str) -> Stored {
        let all: serde_json::Map<_, _> = (0..backends)
            .map(|i| {
                (
                    format!("b{i}"),
                    serde_json::json!({ "address": format!("10.1.{}.{}", i / 250, i % 250 + 1) }),
                )
            })
            .collect();
        let health: serde_json::Value = serde_json::from_str(check).unwrap();
        let desired = serde_json::json!({"services": {"s": {
            "vip": "10.0.0.1", "port": 80, "protocol": "tcp", "health": health, "backends": all}}});
        let revision = Revision { number: 1, author: String::new(), time_ms: 0, message: String::new() };
        Stored { revision, desired: Arc::new(serde_json::from_value(desired).unwrap()) }
    }

    fn id(backend: &str) -> BackendId {
        BackendId { service: "s".parse().unwrap(), backend: backend.parse().unwrap() }
    }

    async fn next(verdicts: &mut mpsc::Receiver<(BackendId, Health)>) -> (String, Health) {
        let (id, health) = verdicts.recv().await.unwrap();
        (id.backend.to_string(), health)
    }

    #[tokio::test(start_paused = true)]
    async fn verdicts_follow_probes_and_survive_a_restart() {
        let up = Arc::new(Mutex::new(true));
        let probe_up = up.clone();
        let prober: Prober = Arc::new(move |_| {
            let up = *probe_up.lock().unwrap();
            Box::pin(
                async move { if up { Ok("fine".to_owned()) } else { Err("connection refused".to_owned()) } },
            )
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
        let turns: Vec<_> = entry.history.iter().map(|t| (t.from, t.to, t.reason.as_str())).collect();
        assert_eq!(
            turns,
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
                Ok("fine".to_owned())
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

    /// Signs of one worker, as they would be counted.
    #[derive(Default)]
    struct Counted(AtomicU32);

    impl PassiveSource for Counted {
        fn signs(&self, _: &lb_common::Address) -> lb_common::sign::Signs {
            lb_common::sign::Signs { unreachable: self.0.load(Ordering::SeqCst), refused: 0 }
        }
    }

    /// A checker of one backend that is probed each ten seconds, and healthy.
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
                Box::pin(async move { if up { Ok("fine".to_owned()) } else { Err("no answer".to_owned()) } })
            });
            let check = format!(r#"{{"kind":"tcp","interval_ms":10000,"jitter_percent":0{more}}}"#);
            let (tx, verdicts) = mpsc::channel(100);
            let (book, signs) = (Arc::new(HealthRegistry::default()), Arc::new(Counted::default()));
            let state = watch::Sender::new(stored(1, &check));
            let checker = Checker::new(book.clone(), 10, prober, tx).with_passive(signs.clone());
            tokio::spawn(checker.run(state.subscribe(), Arc::new(Memory::default())));
            let mut slow = Self { up, signs, book, verdicts, _state: state };
            while next(&mut slow.verdicts).await.1 != Health::Healthy {}
            // A moment after a probe: the next is far off.
            tokio::time::sleep(Duration::from_millis(300)).await;
            slow
        }

        fn entry(&self) -> Entry {
            self.book.get(&id("b0")).unwrap()
        }

        /// Dies, with signs at each look if they are `seen`; says how long it took to be known.
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
    async fn signs_bring_probes_forward_and_those_decide() {
        let mut slow = Slow::start("").await;
        let took = slow.die(true).await;
        // Three probes, as ever, but a second apart.
        assert!(took > Duration::from_secs(2) && took < Duration::from_millis(2_500), "{took:?}");
        let entry = slow.entry();
        let last = entry.history.back().unwrap();
        assert!(
            last.reason.starts_with("no answer; probed early: ") && last.reason.contains("unreachable"),
            "{}",
            last.reason
        );
        assert_eq!((entry.heard.early, entry.heard.refuted, entry.failures), (1, 0, 3));
        assert!(entry.heard.unreachable > 30 && entry.heard.refused == 0, "{:?}", entry.heard);
        // Of one that is known to be dead they say nothing new.
        let before = entry.failures;
        for _ in 0..100 {
            slow.signs.0.fetch_add(1, Ordering::SeqCst);
            tokio::time::sleep(LOOK).await;
        }
        let entry = slow.entry();
        assert!(entry.failures <= before + 1 && entry.heard.early == 1, "{entry:?}");
        // Nor once it is back: they were of before.
        slow.up.store(true, Ordering::SeqCst);
        while next(&mut slow.verdicts).await.1 != Health::Healthy {}
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!((slow.entry().heard.early, slow.entry().health), (1, Health::Healthy));
        let took = slow.die(true).await;
        assert!(took > Duration::from_secs(2) && took < Duration::from_millis(2_500), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn without_signs_a_death_takes_its_time() {
        for (more, seen) in [("", false), (r#","signs":false"#, true)] {
            let mut slow = Slow::start(more).await;
            let took = slow.die(seen).await;
            assert!(took > Duration::from_secs(29), "{took:?}");
            assert_eq!(slow.entry().heard, Default::default());
            assert_eq!(slow.entry().history.back().unwrap().reason, "no answer");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn forged_signs_cost_some_probes_and_no_verdict() {
        let mut slow = Slow::start("").await;
        let before = slow.entry().successes;
        for _ in 0..3_000 {
            slow.signs.0.fetch_add(7, Ordering::SeqCst);
            tokio::time::sleep(LOOK).await;
        }
        let entry = slow.entry();
        assert_eq!((entry.health, entry.failures), (Health::Healthy, 0));
        assert!(entry.heard.early >= 5 && entry.heard.early <= 12, "{:?}", entry.heard);
        assert_eq!(entry.heard.refuted, entry.heard.early);
        // In five minutes: one each ten seconds, and those.
        let probes = entry.successes - before;
        assert!((28..=44).contains(&probes), "{probes}");
        assert!(slow.verdicts.try_recv().is_err());
    }
}
