//! Greedy generation and logits against transformers in f32 (`tests/reference/make_reference.py`).

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::path::Path;

use inference_worker::{
    backend::{BLOCK, SeqPart, StepOutput, Want},
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

/// Prefills each case alone in chunks of `chunk`, then decodes all of them together.
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
        let blocks: Vec<u32> = (next_block..).take((prompt.len() + 32).div_ceil(BLOCK)).collect();
        next_block += blocks.len() as u32;
        for (i, tokens) in prompt.chunks(chunk).enumerate() {
            let part = SeqPart { tokens, start: i * chunk, blocks: &blocks, want: Want::Last };
            model.backend.step(&[part], &mut out).unwrap();
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
        let parts: Vec<SeqPart<'_>> = sequences
            .iter()
            .map(|(blocks, generated, prompt)| SeqPart {
                tokens: &generated[generated.len() - 1..],
                start: prompt + generated.len() - 1,
                blocks,
                want: Want::Last,
            })
            .collect();
        model.backend.step(&parts, &mut out).unwrap();
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
fn native_kernels_on_the_files_own_weights_reproduce_transformers() {
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

/// The same bits alone and in company: each token of a batch is summed in the same order.
#[test]
fn batched_output_equals_unbatched_output() {
    let mut model = load(BackendChoice::Native, DtypeChoice::Auto);
    let vocab = model.config.vocab;
    let prompts: Vec<Vec<u32>> = reference().iter().take(9).map(|c| ids(&c["prompt_ids"])).collect();
    let blocks: Vec<Vec<u32>> = (0..9u32).map(|i| (i * 4..i * 4 + 4).collect()).collect();
    let mut together = StepOutput::default();
    let part = |i: usize| SeqPart { tokens: &prompts[i], start: 0, blocks: &blocks[i], want: Want::Last };
    let parts: Vec<SeqPart<'_>> = (0..9).map(part).collect();
    model.backend.step(&parts, &mut together).unwrap();
    for i in 0..9 {
        let mut alone = StepOutput::default();
        model.backend.step(&[part(i)], &mut alone).unwrap();
        assert_eq!(alone.logits, together.logits[i * vocab..][..vocab], "prompt {i}");
    }
}

/// bf16 rounds: the reference's choice must stay the best where its margin is clear.
#[test]
fn libtorch_in_bf16_agrees_where_the_margin_is_clear() {
    let mut model = load(BackendChoice::Torch, DtypeChoice::Bf16);
    let mut out = StepOutput::default();
    for case in reference().iter().take(6) {
        let prompt = ids(&case["prompt_ids"]);
        let blocks: Vec<u32> = (0..prompt.len().div_ceil(BLOCK) as u32).collect();
        let part = SeqPart { tokens: &prompt, start: 0, blocks: &blocks, want: Want::Last };
        model.backend.step(&[part], &mut out).unwrap();
        for pair in case["top"].as_array().unwrap() {
            let (id, want) = (pair[0].as_u64().unwrap() as usize, pair[1].as_f64().unwrap());
            assert!((f64::from(out.logits[id]) - want).abs() < 0.5, "{:?} logit {id}", case["text"]);
        }
        if case["margins"][0].as_f64().unwrap() > 0.5 {
            assert_eq!(argmax(&out.logits), ids(&case["greedy_ids"])[0]);
        }
    }
}
