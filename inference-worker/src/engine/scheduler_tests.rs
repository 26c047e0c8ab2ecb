use std::time::Instant;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::*;

const LIMITS: StepLimits = StepLimits { max_running: 8, prompt_tokens: 64 };

fn sequence(id: u64, prompt: Vec<u32>) -> (Sequence, UnboundedReceiver<Event>) {
    let (events, receiver) = unbounded_channel();
    let task = Task::Generate(Box::new(GenerationParams { max_tokens: 100, ..GenerationParams::default() }));
    let request = Request { prompt, task, events, arrived: Instant::now(), group: id };
    (Sequence::new(request, id), receiver)
}

/// Completes a step without a model: each sequence whose tokens are all computed gets another one.
fn run(s: &mut Scheduler, chunks: &[ScheduledChunk]) {
    for chunk in chunks {
        s.mark_computed(chunk.index, chunk.tokens);
        let sequence = &mut s.running[chunk.index];
        if sequence.uncomputed_tokens() == 0 {
            sequence.tokens.push(7);
        }
    }
}

fn prompt(salt: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| salt * 1000 + i).collect()
}

#[test]
fn a_long_prompt_is_chunked_and_shorter_prompts_and_decodes_go_first() {
    let mut s = Scheduler::new(KvCacheManager::new(100, true));
    let mut keep = Vec::new();
    for (n, len) in [(1, 3), (2, 400)] {
        let (seq, rx) = sequence(n, prompt(n as u32, len));
        s.waiting.push_back(seq);
        keep.push(rx);
    }
    let chunks = s.schedule(LIMITS);
    assert_eq!(chunks, [ScheduledChunk { index: 0, tokens: 3 }, ScheduledChunk { index: 1, tokens: 29 }]);
    run(&mut s, &chunks);
    let (seq, _rx) = sequence(3, prompt(3, 10));
    s.waiting.push_back(seq);
    let chunks = s.schedule(LIMITS);
    assert_eq!(chunks[0], ScheduledChunk { index: 0, tokens: 1 }, "decoding comes first");
    assert_eq!(chunks[1], ScheduledChunk { index: 2, tokens: 10 }, "then the shorter prompt");
    assert_eq!(chunks[2], ScheduledChunk { index: 1, tokens: 22 });
}

#[test]
fn shorter_prompts_do_not_starve_the_oldest() {
    let mut s = Scheduler::new(KvCacheManager::new(1000, true));
    let (seq, _long) = sequence(0, prompt(99, 600));
    s.waiting.push_back(seq);
    let mut keep = Vec::new();
    for n in 1..200u64 {
        let (seq, rx) = sequence(n, prompt(n as u32, 60));
        s.waiting.push_back(seq);
        keep.push(rx);
        let chunks = s.schedule(StepLimits { max_running: 500, prompt_tokens: 64 });
        run(&mut s, &chunks);
        if s.running[0].output_tokens() > 0 {
            return;
        }
    }
    panic!("200 steps of short prompts kept the long one from finishing");
}

#[test]
fn without_free_blocks_the_youngest_is_preempted_and_resumes_later() {
    let mut s = Scheduler::new(KvCacheManager::new(5, true));
    let mut keep = Vec::new();
    for n in 1..=2 {
        let (seq, rx) = sequence(n, prompt(n as u32, 30));
        s.waiting.push_back(seq);
        keep.push(rx);
    }
    for _ in 0..25 {
        let chunks = s.schedule(LIMITS);
        run(&mut s, &chunks);
    }
    assert!(s.preemptions > 0);
    assert_eq!((s.running.len(), s.waiting.len()), (1, 1));
    assert_eq!(s.waiting[0].id, 2, "the younger one waits");
    let generated = s.waiting[0].output_tokens();
    assert!(generated > 0, "and keeps its output");
    s.remove_running(0);
    let chunks = s.schedule(LIMITS);
    assert_eq!(s.running[0].id, 2);
    assert!(s.running[0].computed_tokens > 0, "its prompt is found in the cache again");
    run(&mut s, &chunks);
    assert_eq!(s.running[0].output_tokens(), generated + 1);
}

#[test]
fn choices_of_one_request_wait_for_the_first_and_share_its_prompt_blocks() {
    let mut s = Scheduler::new(KvCacheManager::new(100, true));
    let mut keep = Vec::new();
    for n in 1..=3 {
        let (mut seq, rx) = sequence(n, prompt(1, 100));
        seq.request.group = 77;
        s.waiting.push_back(seq);
        keep.push(rx);
    }
    for _ in 0..2 {
        let chunks = s.schedule(LIMITS);
        assert_eq!(s.running.len(), 1);
        run(&mut s, &chunks);
    }
    s.schedule(LIMITS);
    assert_eq!(s.running.len(), 3);
    assert_eq!((s.running[1].computed_tokens, s.running[2].computed_tokens), (96, 96));
    assert_eq!(s.cache.used(), 7 + 1 + 1);
}

#[test]
fn a_cancelled_sequence_frees_its_blocks() {
    let mut s = Scheduler::new(KvCacheManager::new(10, true));
    let (seq, rx) = sequence(1, prompt(1, 50));
    s.waiting.push_back(seq);
    s.schedule(LIMITS);
    assert_eq!(s.cache.used(), 4);
    drop(rx);
    assert_eq!(s.remove_cancelled().len(), 1);
    assert_eq!((s.cache.used(), s.is_idle()), (0, true));
}
