use std::time::Instant;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;

const LIMITS: Limits = Limits { max_running: 8, prompt_tokens: 64 };

fn sequence(number: u64, prompt: Vec<u32>) -> (Sequence, UnboundedReceiver<Event>) {
    let (events, receiver) = unbounded_channel();
    let work = Work::Generate(Box::new(Generate { max_tokens: 100, ..Generate::default() }));
    let request = Request { prompt, work, events, arrived: Instant::now(), group: number };
    (Sequence::new(request, number), receiver)
}

/// Runs a planned step without a model: each sequence that finished its tokens gets a next one.
fn run(s: &mut Scheduler, shares: &[Share]) {
    for share in shares {
        s.computed(share.index, share.tokens);
        let sequence = &mut s.running[share.index];
        if sequence.remaining() == 0 {
            sequence.tokens.push(7);
        }
    }
}

fn prompt(flavour: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| flavour * 1000 + i).collect()
}

#[test]
fn a_long_prompt_is_cut_and_a_short_one_overtakes_it_while_others_generate() {
    let mut s = Scheduler::new(KvCache::new(100, true));
    let mut keep = Vec::new();
    for (n, len) in [(1, 3), (2, 400)] {
        let (seq, rx) = sequence(n, prompt(n as u32, len));
        s.waiting.push_back(seq);
        keep.push(rx);
    }
    let shares = s.plan(LIMITS);
    assert_eq!(shares, [Share { index: 0, tokens: 3 }, Share { index: 1, tokens: 29 }]);
    run(&mut s, &shares);
    let (seq, _rx) = sequence(3, prompt(3, 10));
    s.waiting.push_back(seq);
    let shares = s.plan(LIMITS);
    assert_eq!(shares[0], Share { index: 0, tokens: 1 }, "generation comes first");
    assert_eq!(shares[1], Share { index: 2, tokens: 10 }, "then the shorter prompt");
    assert_eq!(shares[2], Share { index: 1, tokens: 22 });
}

#[test]
fn the_oldest_prompt_never_starves() {
    let mut s = Scheduler::new(KvCache::new(1000, true));
    let (seq, _long) = sequence(0, prompt(99, 600));
    s.waiting.push_back(seq);
    let mut keep = Vec::new();
    for n in 1..200u64 {
        let (seq, rx) = sequence(n, prompt(n as u32, 60));
        s.waiting.push_back(seq);
        keep.push(rx);
        let shares = s.plan(Limits { max_running: 500, prompt_tokens: 64 });
        run(&mut s, &shares);
        if s.running[0].generated() > 0 {
            return;
        }
    }
    panic!("200 steps of short prompts kept the long one from finishing");
}

#[test]
fn when_blocks_run_out_the_youngest_waits_and_later_goes_on() {
    let mut s = Scheduler::new(KvCache::new(5, true));
    let mut keep = Vec::new();
    for n in 1..=2 {
        let (seq, rx) = sequence(n, prompt(n as u32, 30));
        s.waiting.push_back(seq);
        keep.push(rx);
    }
    for _ in 0..25 {
        let shares = s.plan(LIMITS);
        run(&mut s, &shares);
    }
    assert!(s.preemptions > 0);
    assert_eq!((s.running.len(), s.waiting.len()), (1, 1));
    assert_eq!(s.waiting[0].number, 2, "the younger one waits");
    let generated = s.waiting[0].generated();
    assert!(generated > 0, "and keeps what it has written");
    s.finish(0);
    let shares = s.plan(LIMITS);
    assert_eq!(s.running[0].number, 2);
    assert!(s.running[0].computed > 0, "its prompt is found in the cache again");
    run(&mut s, &shares);
    assert_eq!(s.running[0].generated(), generated + 1);
}

#[test]
fn choices_of_one_request_wait_for_the_first_and_share_its_prompt() {
    let mut s = Scheduler::new(KvCache::new(100, true));
    let mut keep = Vec::new();
    for n in 1..=3 {
        let (mut seq, rx) = sequence(n, prompt(1, 100));
        seq.request.group = 77;
        s.waiting.push_back(seq);
        keep.push(rx);
    }
    for _ in 0..2 {
        let shares = s.plan(LIMITS);
        assert_eq!(s.running.len(), 1);
        run(&mut s, &shares);
    }
    s.plan(LIMITS);
    assert_eq!(s.running.len(), 3);
    assert_eq!((s.running[1].computed, s.running[2].computed), (96, 96));
    assert_eq!(s.cache.held(), 7 + 1 + 1);
}

#[test]
fn a_sequence_whose_client_left_gives_its_blocks_back() {
    let mut s = Scheduler::new(KvCache::new(10, true));
    let (seq, rx) = sequence(1, prompt(1, 50));
    s.waiting.push_back(seq);
    s.plan(LIMITS);
    assert_eq!(s.cache.held(), 4);
    drop(rx);
    assert_eq!(s.reap().len(), 1);
    assert_eq!((s.cache.held(), s.idle()), (0, true));
}
