//! Time to build tables. Ratios between rows mean something on a shared machine; absolute times less.
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use lb_userspace::plan::maglev::{Member, build};

fn members(count: u64, weighted: bool, down: u64) -> Vec<Member> {
    (0..count)
        .map(|i| Member {
            seat: i as u32,
            weight: if weighted { 1 + (i * 7 % 100) as u32 } else { 1 },
            eligible: i >= down,
        })
        .collect()
}

fn tables(c: &mut Criterion) {
    let mut group = c.benchmark_group("maglev");
    group.sample_size(30);
    for (size, count) in
        [(16_381, 100), (65_537, 10), (65_537, 100), (65_537, 1_000), (65_537, 10_000), (524_287, 5_000)]
    {
        for (name, weighted, down) in
            [("equal", false, 0), ("weighted", true, 0), ("weighted-5-down", true, 5)]
        {
            let members = members(count, weighted, down);
            group.bench_with_input(
                BenchmarkId::new(name, format!("{size}x{count}")),
                &members,
                |b, members| b.iter(|| build([1, 2], size, &[], members)),
            );
        }
    }
    group.finish();
}

criterion_group!(benches, tables);
criterion_main!(benches);
