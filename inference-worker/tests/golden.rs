//! Compares greedy output and logits with transformers in f32 (`tests/reference/make_reference.py`).

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::path::Path;

use inference_worker::{
    backend::{BLOCK_SIZE, OutputKind, SequenceChunk, StepOutput},
    model::{BackendChoice, DtypeChoice, LoadOptions, Model, load_model},
    testing::model_file,
};
use serde_json::Value as Json;

fn reference() -> Vec<Json> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/smollm2.json");
    let json: Json = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    json["cases"].as_array().unwrap().clone()
}

fn load(backend: BackendChoice, dtype: DtypeChoice) -> Model {
    let options = LoadOptions {
        device: tch::Device::Cpu,
        dtype,
        backend,
        threads: 2,
        kv_bytes: Some(512 << 20),
        max_context: None,
    };
    load_model(&model_file(), &options).unwrap()
}

fn ids(json: &Json) -> Vec<u32> {
    json.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn argmax(row: &[f32]) -> u32 {
    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32
}

/// Prefills each case alone in chunks of `chunk` tokens, decodes all cases in one batch, and compares them with the
/// reference.
fn check(model: &mut Model, chunk: usize) {
    let cases = reference();
    assert!(cases.len() >= 20);
    let vocab = model.config.vocab;
    let mut out = StepOutput::default();
    let mut next_block = 0u32;
    let mut sequences: Vec<(Vec<u32>, Vec<u32>, usize)> = Vec::new();
    for case in &cases {
        let text = case["text"].as_str().unwrap();
        let prompt = ids(&case["prompt_ids"]);
        assert_eq!(model.tokenizer.encode(text, true).unwrap(), prompt, "{text:?}");
        let blocks: Vec<u32> = (next_block..).take((prompt.len() + 32).div_ceil(BLOCK_SIZE)).collect();
        next_block += blocks.len() as u32;
        for (i, tokens) in prompt.chunks(chunk).enumerate() {
            let chunk = SequenceChunk {
                tokens,
                start: i * chunk,
                block_table: &blocks,
                output: OutputKind::LastLogits,
            };
            model.backend.step(&[chunk], &mut out).unwrap();
        }
        for pair in case["top"].as_array().unwrap() {
            let (id, want) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            assert!((f64::from(out.logits[id]) - want).abs() < 1e-3, "{text:?} logit {id}");
        }
        for (i, want) in case["every_1000th"].as_array().unwrap().iter().enumerate() {
            assert!((f64::from(out.logits[i * 1000]) - want.as_f64().unwrap()).abs() < 1e-3, "{text:?}");
        }
        let first = argmax(&out.logits);
        sequences.push((blocks, vec![first], prompt.len()));
    }
    for _ in 1..32 {
        let batch: Vec<SequenceChunk<'_>> = sequences
            .iter()
            .map(|(blocks, generated, prompt)| SequenceChunk {
                tokens: &generated[generated.len() - 1..],
                start: prompt + generated.len() - 1,
                block_table: blocks,
                output: OutputKind::LastLogits,
            })
            .collect();
        model.backend.step(&batch, &mut out).unwrap();
        for (i, (_, generated, _)) in sequences.iter_mut().enumerate() {
            generated.push(argmax(&out.logits[i * vocab..][..vocab]));
        }
    }
    for (case, (_, generated, _)) in cases.iter().zip(&sequences) {
        let want = ids(&case["greedy_ids"]);
        if let Some(at) = (0..32).find(|i| generated[*i] != want[*i]) {
            let margin = case["margins"][at].as_f64().unwrap();
            assert!(margin < 1e-4, "{:?} differs at token {at} where the margin is {margin}", case["text"]);
        }
    }
}

#[test]
fn the_native_backend_reproduces_transformers() {
    check(&mut load(BackendChoice::Native, DtypeChoice::Auto), 512);
}

#[test]
fn chunked_prefill_reproduces_transformers() {
    check(&mut load(BackendChoice::Native, DtypeChoice::Auto), 7);
}

#[test]
fn libtorch_in_f32_reproduces_transformers() {
    check(&mut load(BackendChoice::Torch, DtypeChoice::F32), 100);
}

/// The order of additions does not depend on the batch.
#[test]
fn batched_logits_equal_unbatched_logits_bit_by_bit() {
    let mut model = load(BackendChoice::Native, DtypeChoice::Auto);
    let vocab = model.config.vocab;
    let prompts: Vec<Vec<u32>> = reference().iter().take(9).map(|c| ids(&c["prompt_ids"])).collect();
    let blocks: Vec<Vec<u32>> = (0..9u32).map(|i| (i * 4..i * 4 + 4).collect()).collect();
    let mut together = StepOutput::default();
    let chunk = |i: usize| SequenceChunk {
        tokens: &prompts[i],
        start: 0,
        block_table: &blocks[i],
        output: OutputKind::LastLogits,
    };
    let batch: Vec<SequenceChunk<'_>> = (0..9).map(chunk).collect();
    model.backend.step(&batch, &mut together).unwrap();
    for i in 0..9 {
        let mut alone = StepOutput::default();
        model.backend.step(&[chunk(i)], &mut alone).unwrap();
        assert_eq!(alone.logits, together.logits[i * vocab..][..vocab], "prompt {i}");
    }
}

/// bf16 rounds, so the reference's token must be the most likely one only where its margin is large.
#[test]
fn libtorch_in_bf16_agrees_where_the_margin_is_large() {
    let mut model = load(BackendChoice::Torch, DtypeChoice::Bf16);
    let mut out = StepOutput::default();
    for case in reference().iter().take(6) {
        let prompt = ids(&case["prompt_ids"]);
        let blocks: Vec<u32> = (0..prompt.len().div_ceil(BLOCK_SIZE) as u32).collect();
        let chunk =
            SequenceChunk { tokens: &prompt, start: 0, block_table: &blocks, output: OutputKind::LastLogits };
        model.backend.step(&[chunk], &mut out).unwrap();
        for pair in case["top"].as_array().unwrap() {
            let (id, want) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            assert!((f64::from(out.logits[id]) - want).abs() < 0.5, "{:?} logit {id}", case["text"]);
        }
        if case["margins"][0].as_f64().unwrap() > 0.5 {
            assert_eq!(argmax(&out.logits), ids(&case["greedy_ids"])[0]);
        }
    }
}
