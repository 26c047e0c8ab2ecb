//! Tests of loading: GGUF files and Hugging Face directories agree, and invalid ones are rejected with an error
//! message, without a panic.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::path::Path;

use inference_worker::{
    backend::{OutputKind, SequenceChunk, StepOutput},
    model::{BackendChoice, DtypeChoice, LoadOptions, Model, load_model},
    testing::TinyModel,
};
use rand::{Rng, SeedableRng, rngs::StdRng};

fn options() -> LoadOptions {
    LoadOptions {
        device: tch::Device::Cpu,
        dtype: DtypeChoice::Auto,
        backend: BackendChoice::Auto,
        threads: 1,
        kv_bytes: Some(1 << 20),
        max_context: None,
    }
}

fn logits(model: &mut Model, tokens: &[u32]) -> Vec<f32> {
    let mut out = StepOutput::default();
    let chunk = SequenceChunk { tokens, start: 0, block_table: &[3, 1], output: OutputKind::AllLogits };
    model.backend.step(&[chunk], &mut out).unwrap();
    out.logits
}

fn load_error(path: &Path) -> String {
    match load_model(path, &options()) {
        Ok(_) => panic!("{} was loaded", path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn gguf_directory_and_both_backends_give_equal_logits() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let file = directory.path().join("tiny.gguf");
    std::fs::write(&file, TinyModel::default().to_gguf(directory.path())).unwrap();
    let tokens: Vec<u32> = (0..25).map(|i| i * 9 % 256).collect();
    let want = logits(&mut load_model(directory.path(), &options()).unwrap(), &tokens);
    let mut gguf = load_model(&file, &options()).unwrap();
    assert_eq!(gguf.tokenizer.encode("hé<|im_end|>", true).unwrap(), [104, 195, 169, 257]);
    assert_eq!(logits(&mut gguf, &tokens), want, "the same weights in another order");
    for dtype in [DtypeChoice::F32, DtypeChoice::Bf16, DtypeChoice::F16] {
        let torch = LoadOptions { backend: BackendChoice::Torch, dtype, ..options() };
        let got = logits(&mut load_model(&file, &torch).unwrap(), &tokens);
        let near = if dtype == DtypeChoice::F32 { 1e-4 } else { 0.1 };
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < near), "{dtype:?}");
    }
}

#[test]
fn truncated_files_are_rejected_with_their_name() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let whole = TinyModel::default().to_gguf(directory.path());
    let file = directory.path().join("cut.gguf");
    for len in [0, 3, 4, 10, 24, 100, 1000, 5000, whole.len() / 2, whole.len() - 100] {
        std::fs::write(&file, &whole[..len]).unwrap();
        let error = load_error(&file);
        assert!(error.contains("cut.gguf"), "{len}: {error}");
    }
    let weights = directory.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for len in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&weights, &whole[..len]).unwrap();
        assert!(load_error(directory.path()).contains("model.safetensors"), "{len}");
    }
}

/// Random bytes before the data must cause an error, or no difference.
#[test]
fn damaged_headers_do_not_cause_a_panic() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let whole = TinyModel::default().to_gguf(directory.path());
    let header = whole.len() - 400_000.min(whole.len() / 2);
    let file = directory.path().join("damaged.gguf");
    let mut rng = StdRng::seed_from_u64(4);
    let mut rejected = 0;
    for _ in 0..300 {
        let mut bytes = whole.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..header.min(9000));
            bytes[at] = rng.random();
        }
        std::fs::write(&file, &bytes).unwrap();
        rejected += usize::from(load_model(&file, &options()).is_err());
    }
    assert!(rejected > 100, "only {rejected} of 300 were rejected");
}

#[test]
fn unsupported_models_are_rejected_with_the_name_of_what_is_unsupported() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let whole = TinyModel::default().to_gguf(directory.path());
    let file = directory.path().join("other.gguf");
    let replace = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        std::fs::write(&file, bytes).unwrap();
        load_error(&file)
    };
    let mut architecture = 5u64.to_le_bytes().to_vec();
    architecture.extend(b"llama");
    let mut mamba = 5u64.to_le_bytes().to_vec();
    mamba.extend(b"mamba");
    assert!(replace(&architecture, &mamba).contains("`mamba` is not supported"));
    assert!(replace(b"gpt-2", b"gpt-9").contains("gpt-9"));
    // The type number follows the name, the rank and two dimensions.
    let mut tensor = b"blk.1.ffn_up.weight".to_vec();
    let at = whole.windows(tensor.len()).position(|w| w == tensor).unwrap();
    tensor = whole[at..at + tensor.len() + 4 + 16 + 4].to_vec();
    let mut iq = tensor.clone();
    let end = iq.len();
    iq[end - 4] = 16;
    let error = replace(&tensor, &iq);
    assert!(error.contains("blk.1.ffn_up.weight") || error.contains("up_proj"), "{error}");
    assert!(error.contains("IQ2_XXS"), "{error}");
    assert!(load_error(Path::new("/nonexistent/model.gguf")).contains("/nonexistent/model.gguf"));
    std::fs::remove_file(directory.path().join("model.safetensors")).unwrap();
    assert!(load_error(directory.path()).contains("no .safetensors"));
    // An unsupported architecture is reported before missing weights, so that nobody converts weights in vain.
    std::fs::write(directory.path().join("config.json"), r#"{"architectures":["MambaForCausalLM"]}"#)
        .unwrap();
    assert!(load_error(directory.path()).contains("`MambaForCausalLM` is not supported"));
}

#[test]
fn a_tokenizer_of_another_model_is_rejected() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let config = std::fs::read_to_string(directory.path().join("config.json")).unwrap();
    std::fs::write(
        directory.path().join("config.json"),
        config.replace("\"vocab_size\":258", "\"vocab_size\":200"),
    )
    .unwrap();
    assert!(load_error(directory.path()).contains("another model"));
    std::fs::write(directory.path().join("config.json"), "{").unwrap();
    assert!(load_error(directory.path()).contains("config.json"));
}

#[test]
fn unusable_options_are_rejected_with_the_flag_to_change() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let with = |o: LoadOptions| load_model(directory.path(), &o).err().unwrap().to_string();
    assert!(with(LoadOptions { kv_bytes: Some(100), ..options() }).contains("--kv-cache-mib"));
    let mixed = LoadOptions { backend: BackendChoice::Native, dtype: DtypeChoice::Bf16, ..options() };
    assert!(with(mixed).contains("--backend torch"));
    let gpu = LoadOptions { device: tch::Device::Cuda(99), ..options() };
    assert!(with(gpu).contains("cuda:99 not found"));
}
