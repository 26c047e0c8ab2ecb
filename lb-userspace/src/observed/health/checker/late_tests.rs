//! Tests of workers that are slow: they accept connections, and answer their checks late.

use super::{tests::*, *};
use crate::{desired::model::HealthKind, observed::health::Outcome};
use std::sync::Mutex;

/// A worker: how long its answer takes, and whether its host accepts connections.
#[derive(Clone, Copy)]
struct Slowness {
    answer: Duration,
    accepts: bool,
}

/// A checked worker.
struct SlowWorker {
    slowness: Arc<Mutex<Slowness>>,
    /// Requests, and connections without one.
    asked: Arc<Mutex<(u32, u32)>>,
    book: Arc<HealthRegistry>,
    verdicts: mpsc::Receiver<(BackendId, Health)>,
    _state: watch::Sender<Stored>,
}

const QUICK: Duration = Duration::from_millis(5);
const NEVER: Duration = Duration::from_secs(1_000_000);

impl SlowWorker {
    /// A worker that has been found healthy.
    async fn start(more: &str) -> Self {
        let slowness = Arc::new(Mutex::new(Slowness { answer: QUICK, accepts: true }));
        let asked = Arc::new(Mutex::new((0, 0)));
        let (worker, count) = (slowness.clone(), asked.clone());
        let prober: Prober = Arc::new(move |target: ProbeTarget| {
            let Slowness { answer, accepts } = *worker.lock().unwrap();
            let only_connects = target.kind == HealthKind::Tcp;
            let mut asked = count.lock().unwrap();
            *(if only_connects { &mut asked.1 } else { &mut asked.0 }) += 1;
            Box::pin(async move {
                if !accepts {
                    return outcome(false, "connection refused");
                }
                if only_connects || answer <= target.timeout {
                    tokio::time::sleep(if only_connects { QUICK } else { answer }).await;
                    return outcome(true, "");
                }
                let answered = Instant::now() + answer;
                tokio::time::sleep(target.timeout).await;
                ProbeStep::Late(Box::pin(async move {
                    tokio::time::sleep_until(answered).await;
                    Outcome::Passed("fine".to_owned())
                }))
            })
        });
        let check = format!(r#"{{"kind":"http","interval_ms":1000,"jitter_percent":0{more}}}"#);
        let state = watch::Sender::new(stored(1, &check));
        let (tx, verdicts) = mpsc::channel(100);
        let book = Arc::new(HealthRegistry::default());
        let checker = Checker::new(book.clone(), 10, prober, tx);
        tokio::spawn(checker.run(state.subscribe(), Arc::new(Memory::default())));
        let mut worker = Self { slowness, asked, book, verdicts, _state: state };
        while next(&mut worker.verdicts).await.1 != Health::Healthy {}
        tokio::time::sleep(Duration::from_secs(2)).await;
        worker
    }

    fn set(&self, answer: Duration, accepts: bool) {
        *self.slowness.lock().unwrap() = Slowness { answer, accepts };
    }

    fn entry(&self) -> HealthEntry {
        self.book.get(&id("b0")).unwrap()
    }

    /// Time until the verdict changes to `health`.
    async fn becomes(&mut self, health: Health) -> Duration {
        let start = Instant::now();
        assert_eq!(next(&mut self.verdicts).await, ("b0".into(), health));
        start.elapsed()
    }
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_answers_after_half_a_minute_is_busy_and_not_dead() {
    let mut worker = SlowWorker::start("").await;
    worker.set(Duration::from_secs(35), true);
    let (requests, _) = *worker.asked.lock().unwrap();
    tokio::time::sleep(Duration::from_secs(600)).await;
    assert!(worker.verdicts.try_recv().is_err(), "no verdict in ten minutes");
    let entry = worker.entry();
    assert_eq!((entry.health, entry.failures, entry.history.len()), (Health::Healthy, 0, 1));
    assert!(entry.is_busy().is_some() && entry.late > 500, "{entry:?}");
    let last = entry.last.unwrap();
    assert!(last.late && last.reason.contains("connections are accepted"), "{last:?}");
    let (asked, connected) = *worker.asked.lock().unwrap();
    assert!(asked - requests <= 19 && connected > 500, "one request at a time: {asked} {connected}");
    worker.set(QUICK, true);
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert_eq!(worker.entry().is_busy(), None);
    assert!(worker.verdicts.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_busy_worker_that_dies_is_found_as_fast_as_any() {
    let mut worker = SlowWorker::start("").await;
    worker.set(Duration::from_secs(35), true);
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(worker.entry().is_busy().is_some());
    worker.set(NEVER, false);
    let took = worker.becomes(Health::Unhealthy).await;
    assert!(took <= Duration::from_millis(3_100), "{took:?}");
    assert_eq!(worker.entry().is_busy(), None);
    worker.set(QUICK, true);
    let took = worker.becomes(Health::Healthy).await;
    assert!(took <= Duration::from_millis(2_200), "it does not wait for the old connection: {took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_long_silence_is_death() {
    let mut worker = SlowWorker::start("").await;
    worker.set(NEVER, true);
    let took = worker.becomes(Health::Unhealthy).await;
    assert!(took > Duration::from_secs(59) && took < Duration::from_secs(62), "{took:?}");
    let reason = worker.entry().history.back().unwrap().reason.clone();
    assert_eq!(reason, "no answer for 60 s, connections are accepted");
    // It comes back slow: two late answers are two successes.
    worker.set(Duration::from_secs(20), true);
    let took = worker.becomes(Health::Healthy).await;
    assert!(took < Duration::from_secs(103), "{took:?}");
    assert!(worker.entry().is_busy().is_some());
}

#[tokio::test(start_paused = true)]
async fn how_long_a_worker_may_be_busy_is_a_setting() {
    for (more, at_least, at_most) in
        [(r#","busy_timeout_ms":0"#, 3, 6), (r#","busy_timeout_ms":10000"#, 9, 12)]
    {
        let mut worker = SlowWorker::start(more).await;
        worker.set(NEVER, true);
        let took = worker.becomes(Health::Unhealthy).await.as_secs();
        assert!((at_least..at_most).contains(&took), "{more}: {took} s");
    }
}
