//! Time from a changed desired state to a plan: 100 services with 100 backends each.
#![allow(missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use lb_userspace::{
    desired::model::{Backend, Desired, Name, Observed, Service},
    plan::compile::{Cache, DeploymentSettings, Memory, compile},
};
use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    time::{Duration, Instant},
};

fn name(prefix: &str, i: u32) -> Name {
    format!("{prefix}{i}").parse().expect("a letter and digits")
}

fn backend(service: u32, i: u32) -> Backend {
    let address = Ipv4Addr::from(0x0a10_0000 + service * 256 + i);
    serde_json::from_value(serde_json::json!({ "address": address, "weight": 1 + i % 7 })).expect("valid")
}

fn desired() -> Desired {
    let service = |s: u32| -> Service {
        let vip = Ipv4Addr::from(0x0a00_0100 + s);
        let json = serde_json::json!({ "vip": vip, "port": 80, "protocol": "tcp" });
        let mut service: Service = serde_json::from_value(json).expect("valid");
        service.backends = (0..100).map(|i| (name("b", i), backend(s, i))).collect();
        service
    };
    Desired { services: (0..100).map(|s| (name("s", s), service(s).into())).collect(), ..Desired::default() }
}

fn compilations(c: &mut Criterion) {
    let mut group = c.benchmark_group("compile");
    group.sample_size(20);
    let before = desired();
    let settings = DeploymentSettings::default();
    let mut observed = Observed { now: Duration::from_secs(1), ..Observed::default() };
    let mut cache = Cache::default();
    let first = compile(&before, &observed, &Memory::default(), &settings, &mut cache).expect("fits");
    observed.now = Duration::from_secs(2);

    group.bench_function("nothing-changed-100x100", |b| {
        b.iter(|| compile(&before, &observed, &first.memory, &settings, &mut cache));
    });
    // Each iteration starts from what the one before has left, as a daemon does.
    let (mut i, mut memory, mut state) = (0, first.memory.clone(), before.clone());
    group.bench_function("one-backend-added-100x100", |b| {
        b.iter_custom(|iterations| {
            let mut took = Duration::ZERO;
            for _ in 0..iterations {
                i += 1;
                let service = state.service_mut(&name("s", i % 100)).expect("one of the hundred");
                let last = service.backends.keys().next_back().expect("a hundred backends").clone();
                service.backends.remove(&last);
                service.backends.insert(name("new", i), backend(200 + i / 250 % 50, i % 250));
                observed.now += Duration::from_secs(4);
                let began = Instant::now();
                let compiled = compile(&state, &observed, &memory, &settings, &mut cache).expect("fits");
                took += began.elapsed();
                memory = compiled.memory;
                let all = (0..settings.limits.backends).collect();
                memory.release(&BTreeSet::new(), &all);
            }
            took
        });
    });
    group.bench_function("everything-anew-100x100", |b| {
        b.iter(|| compile(&before, &observed, &first.memory, &settings, &mut Cache::default()));
    });
    group.finish();
}

criterion_group!(benches, compilations);
criterion_main!(benches);
