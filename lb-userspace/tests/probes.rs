//! Cost of checking many backends: CPU time of the probing thread, over the loopback interface.
//!
//! `cargo test --release --test probes -- --nocapture` prints the numbers of optimised code; unoptimised it checks a
//! fifth of the backends, and only that each is probed.
#![allow(missing_docs, clippy::unwrap_used)]

use futures_util::future::BoxFuture;
use lb_userspace::{
    desired::store::{Local, Revision, StoreError, Stored},
    observed::health::{Checker, HealthRegistry, prober},
};
use nix::time::{ClockId, clock_gettime};
use std::{
    net::TcpListener,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};

struct Nothing;

impl Local for Nothing {
    fn load(&self, _: &'static str) -> BoxFuture<'_, Result<Option<Vec<u8>>, StoreError>> {
        Box::pin(async { Ok(None) })
    }
    fn save(&self, _: &'static str, _: Vec<u8>) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async { Ok(()) })
    }
}

/// Backends on addresses of the loopback network, all behind one listener.
fn stored(backends: usize, port: u16, kind: &str) -> Stored {
    let all: serde_json::Map<_, _> = (0..backends)
        .map(|i| {
            (format!("b{i}"), serde_json::json!({ "address": format!("127.1.{}.{}", i / 250, i % 250 + 1) }))
        })
        .collect();
    let desired = serde_json::json!({"services": {"s": {"vip": "10.0.0.1", "port": port, "protocol": "tcp",
        "health": {"kind": kind, "interval_ms": 1_000, "timeout_ms": 2_000}, "backends": all}}});
    let revision =
        Revision { number: 1, author: String::new(), time_ms: 0, message: String::new(), summary: None };
    Stored { revision, desired: Arc::new(serde_json::from_value(desired).unwrap()) }
}

/// A listener with its own threads, which accept every connection and answer HTTP requests.
fn serve(answer: bool) -> u16 {
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // The standard library's backlog of 128 is too short for thousands of connections at a time.
    socket2::SockRef::from(&listener).listen(8_192).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            if answer {
                use std::io::{Read, Write};
                let mut request = [0; 1_024];
                let _ = stream.read(&mut request);
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok");
            }
        }
    });
    port
}

fn cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

/// Probes for some seconds after all backends have a verdict; returns probes per second and the share of a core.
fn measure(backends: usize, kind: &'static str) -> (f64, f64) {
    let port = serve(kind == "http");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let book = Arc::new(HealthRegistry::default());
        let (verdicts, mut told) = mpsc::channel(100_000);
        tokio::spawn(async move { while told.recv().await.is_some() {} });
        let checker = Checker::new(book.clone(), 512, prober(), verdicts);
        let state = watch::Sender::new(stored(backends, port, kind));
        tokio::spawn(checker.run(state.subscribe(), Arc::new(Nothing)));
        let count = || {
            book.read(|all| {
                all.values().map(|e| (e.successes, e.failures)).unzip::<_, _, Vec<u64>, Vec<u64>>()
            })
        };
        let begun = Instant::now();
        while count().0.iter().filter(|&&n| n >= 2).count() < backends {
            assert!(begun.elapsed() < Duration::from_secs(60), "not all were ever healthy");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        let (before, used, start) = (count(), cpu(), Instant::now());
        tokio::time::sleep(Duration::from_secs(5)).await;
        let (after, used, took) = (count(), cpu() - used, start.elapsed().as_secs_f64());
        let sum = |(ok, failed): &(Vec<u64>, Vec<u64>)| ok.iter().chain(failed).sum::<u64>();
        let forgotten = after.0.iter().zip(&before.0).filter(|(a, b)| a == b).count();
        assert_eq!(forgotten, 0, "{forgotten} were not probed in 5 s");
        ((sum(&after) - sum(&before)) as f64 / took, used.as_secs_f64() / took)
    })
}

#[test]
fn thousands_of_backends_are_checked_each_second_by_one_core() {
    let backends = if cfg!(debug_assertions) { 2_000 } else { 10_000 };
    for kind in ["tcp", "http"] {
        let (rate, core) = measure(backends, kind);
        let each = core / rate * 1e6;
        println!(
            "{backends} backends by {kind}: {rate:.0} probes/s, {:.0} % of a core, {each:.1} µs each",
            core * 100.0
        );
        // The share of a core is only printed; the rate is checked, unless other processes use the machine.
        assert!(rate > backends as f64 * 0.6, "{rate:.0} probes/s of {backends} backends");
    }
}
