//! Loading models: both file kinds agree, and broken ones are refused with words, never with a panic.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::path::Path;

use inference_worker::{
    backend::{SeqPart, StepOutput, Want},
    model::{BackendChoice, DtypeChoice, LoadOptions, Model, load_model},
    testing::Tiny,
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
    let part = SeqPart { tokens, start: 0, blocks: &[3, 1], want: Want::All };
    model.backend.step(&[part], &mut out).unwrap();
    out.logits
}

fn refusal(path: &Path) -> String {
    match load_model(path, &options()) {
        Ok(_) => panic!("{} was loaded", path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn gguf_folder_and_both_backends_agree() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let file = folder.path().join("tiny.gguf");
    std::fs::write(&file, Tiny::default().gguf_from(folder.path())).unwrap();
    let tokens: Vec<u32> = (0..25).map(|i| i * 9 % 256).collect();
    let want = logits(&mut load_model(folder.path(), &options()).unwrap(), &tokens);
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
fn truncated_files_say_so() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let whole = Tiny::default().gguf_from(folder.path());
    let file = folder.path().join("cut.gguf");
    for len in [0, 3, 4, 10, 24, 100, 1000, 5000, whole.len() / 2, whole.len() - 100] {
        std::fs::write(&file, &whole[..len]).unwrap();
        let says = refusal(&file);
        assert!(says.contains("cut.gguf"), "{len}: {says}");
    }
    let weights = folder.path().join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    for len in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&weights, &whole[..len]).unwrap();
        assert!(refusal(folder.path()).contains("model.safetensors"), "{len}");
    }
}

/// Flipped bytes anywhere before the data: an error or (where it does not matter) a model, never a panic.
#[test]
fn damaged_headers_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let whole = Tiny::default().gguf_from(folder.path());
    let header = whole.len() - 400_000.min(whole.len() / 2);
    let file = folder.path().join("damaged.gguf");
    let mut rng = StdRng::seed_from_u64(4);
    let mut refused = 0;
    for _ in 0..300 {
        let mut bytes = whole.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..header.min(9000));
            bytes[at] = rng.random();
        }
        std::fs::write(&file, &bytes).unwrap();
        refused += usize::from(load_model(&file, &options()).is_err());
    }
    assert!(refused > 100, "only {refused} of 300 were refused");
}

#[test]
fn what_is_not_a_llama_is_named() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let whole = Tiny::default().gguf_from(folder.path());
    let file = folder.path().join("other.gguf");
    let replace = |from: &[u8], to: &[u8]| {
        let at = whole.windows(from.len()).position(|w| w == from).unwrap();
        let mut bytes = whole.clone();
        bytes[at..at + to.len()].copy_from_slice(to);
        std::fs::write(&file, bytes).unwrap();
        refusal(&file)
    };
    let mut architecture = 5u64.to_le_bytes().to_vec();
    architecture.extend(b"llama");
    let mut mamba = 5u64.to_le_bytes().to_vec();
    mamba.extend(b"mamba");
    assert!(replace(&architecture, &mamba).contains("`mamba` is not supported"));
    assert!(replace(b"gpt-2", b"gpt-9").contains("gpt-9"));
    // The type number stands after the name, the rank and two dimensions.
    let mut tensor = b"blk.1.ffn_up.weight".to_vec();
    let at = whole.windows(tensor.len()).position(|w| w == tensor).unwrap();
    tensor = whole[at..at + tensor.len() + 4 + 16 + 4].to_vec();
    let mut iq = tensor.clone();
    let end = iq.len();
    iq[end - 4] = 16;
    let says = replace(&tensor, &iq);
    assert!(says.contains("blk.1.ffn_up.weight") || says.contains("up_proj"), "{says}");
    assert!(says.contains("IQ2_XXS"), "{says}");
    assert!(refusal(Path::new("/nonexistent/model.gguf")).contains("/nonexistent/model.gguf"));
    std::fs::remove_file(folder.path().join("model.safetensors")).unwrap();
    assert!(refusal(folder.path()).contains("no .safetensors"));
    // Nobody should convert weights first, and then learn that they cannot be served.
    std::fs::write(folder.path().join("config.json"), r#"{"architectures":["MambaForCausalLM"]}"#).unwrap();
    assert!(refusal(folder.path()).contains("`MambaForCausalLM` is not supported"));
}

#[test]
fn a_folder_with_another_models_tokenizer_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let config = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    std::fs::write(
        folder.path().join("config.json"),
        config.replace("\"vocab_size\":258", "\"vocab_size\":200"),
    )
    .unwrap();
    assert!(refusal(folder.path()).contains("another model"));
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(refusal(folder.path()).contains("config.json"));
}

#[test]
fn options_that_cannot_work_are_explained() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let with = |o: LoadOptions| load_model(folder.path(), &o).err().unwrap().to_string();
    assert!(with(LoadOptions { kv_bytes: Some(100), ..options() }).contains("--kv-cache-mib"));
    let mixed = LoadOptions { backend: BackendChoice::Native, dtype: DtypeChoice::Bf16, ..options() };
    assert!(with(mixed).contains("--backend torch"));
    let gpu = LoadOptions { device: tch::Device::Cuda(99), ..options() };
    assert!(with(gpu).contains("cuda:99 is not there"));
}
