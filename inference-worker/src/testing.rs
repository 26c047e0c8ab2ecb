//! Test support: the path of the real model, tiny random models, and a worker in the test process.

use std::path::PathBuf;

/// File name of the default model.
pub const MODEL_FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// Returns the cache directory of `cargo xtask setup`: `$LB_CACHE_DIR`, else `$XDG_CACHE_HOME/lb-inference`, else
/// `~/.cache/lb-inference`.
pub fn cache_dir() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    var("LB_CACHE_DIR")
        .or_else(|| Some(var("XDG_CACHE_HOME")?.join("lb-inference")))
        .or_else(|| Some(var("HOME")?.join(".cache/lb-inference")))
        .unwrap_or_else(|| PathBuf::from(".cache/lb-inference"))
}

/// Returns the path of the default model. The environment variable `LB_MODEL` overrides it.
///
/// # Panics
/// If the file is missing, so that tests that need it fail instead of being skipped.
pub fn model_file() -> PathBuf {
    let path = std::env::var_os("LB_MODEL")
        .map_or_else(|| cache_dir().join("models").join(MODEL_FILE), PathBuf::from);
    assert!(path.exists(), "{} is missing: run `cargo xtask setup model`", path.display());
    path
}

/// A tiny model with random weights.
#[derive(Debug, Clone, Copy)]
pub struct TinyModel {
    /// Seed of the weights.
    pub seed: u64,
    /// Context length.
    pub context: usize,
}

impl Default for TinyModel {
    fn default() -> Self {
        Self { seed: 1, context: 512 }
    }
}

const HIDDEN: usize = 64;
const FFN: usize = 96;
const LAYERS: usize = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD: usize = 16;
/// 256 bytes and two special tokens.
const VOCAB: usize = 258;

impl TinyModel {
    /// Returns names and shapes of the tensors.
    fn tensors() -> Vec<(String, Vec<usize>)> {
        let mut list = vec![
            ("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN]),
            ("model.norm.weight".to_owned(), vec![HIDDEN]),
            ("lm_head.weight".to_owned(), vec![VOCAB, HIDDEN]),
        ];
        for layer in 0..LAYERS {
            for (name, shape) in [
                ("input_layernorm", vec![HIDDEN]),
                ("post_attention_layernorm", vec![HIDDEN]),
                ("self_attn.q_proj", vec![HEADS * HEAD, HIDDEN]),
                ("self_attn.k_proj", vec![KV_HEADS * HEAD, HIDDEN]),
                ("self_attn.v_proj", vec![KV_HEADS * HEAD, HIDDEN]),
                ("self_attn.o_proj", vec![HIDDEN, HEADS * HEAD]),
                ("mlp.gate_proj", vec![FFN, HIDDEN]),
                ("mlp.up_proj", vec![FFN, HIDDEN]),
                ("mlp.down_proj", vec![HIDDEN, FFN]),
            ] {
                list.push((format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        list
    }

    /// Writes the model as a Hugging Face directory.
    ///
    /// # Panics
    /// If the directory cannot be written.
    pub fn write(self, directory: &std::path::Path) {
        use rand::{Rng, SeedableRng};
        use safetensors::{Dtype, tensor::TensorView};
        let mut rng = rand::rngs::StdRng::seed_from_u64(self.seed);
        let data: Vec<(String, Vec<usize>, Vec<u8>)> = Self::tensors()
            .into_iter()
            .map(|(name, shape)| {
                let len: usize = shape.iter().product();
                let norm = shape.len() == 1;
                let value =
                    |rng: &mut rand::rngs::StdRng| if norm { 1.0 } else { rng.random_range(-0.2f32..0.2) };
                let bytes = (0..len).flat_map(|_| value(&mut rng).to_le_bytes()).collect();
                (name, shape, bytes)
            })
            .collect();
        let views = data.iter().map(|(name, shape, bytes)| {
            (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("the length matches the shape"))
        });
        let file = safetensors::serialize(views, None).expect("the views are valid");
        std::fs::write(directory.join("model.safetensors"), file).expect("the directory is writable");
        let config = serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN,
            "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD, "vocab_size": VOCAB, "max_position_embeddings": self.context, "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "tie_word_embeddings": false, "eos_token_id": 257,
        });
        std::fs::write(directory.join("config.json"), config.to_string()).expect("the directory is writable");
        std::fs::write(directory.join("tokenizer.json"), tiny_tokenizer().to_string())
            .expect("the directory is writable");
    }
}

impl TinyModel {
    /// Converts the model in `directory` to a GGUF file with llama.cpp's order of rows.
    ///
    /// # Panics
    /// If `directory` does not have this model.
    pub fn to_gguf(self, directory: &std::path::Path) -> Vec<u8> {
        let source = crate::weights::hf::HfDirectory::open(directory).expect("the tiny model was written");
        let tensors = Self::tensors();
        let mut out = Vec::new();
        out.extend(b"GGUF");
        out.extend(3u32.to_le_bytes());
        out.extend((tensors.len() as u64).to_le_bytes());
        self.write_metadata(&mut out);
        let mut data: Vec<u8> = Vec::new();
        for (name, shape) in tensors {
            let gguf_name = crate::weights::gguf::gguf_name(&name).expect("a tensor of a Llama model");
            write_string(&mut out, &gguf_name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend((*d as u64).to_le_bytes()));
            out.extend(0u32.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            let tensor =
                crate::weights::WeightSource::tensor(&source, &name).expect("readable").expect("present");
            let row = shape.last().map_or(0, |d| d * 4);
            let rotated = name.contains("q_proj") || name.contains("k_proj");
            for r in 0..tensor.bytes.len() / row {
                // Within a head, llama.cpp's row 2i is Hugging Face's row i, and row 2i + 1 is row i + half.
                let from = if rotated { r / HEAD * HEAD + r % HEAD / 2 + r % 2 * (HEAD / 2) } else { r };
                data.extend(&tensor.bytes[from * row..(from + 1) * row]);
            }
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    /// Writes the number of metadata entries and the entries.
    fn write_metadata(self, out: &mut Vec<u8>) {
        let mut tokens: Vec<String> = vec![String::new(); VOCAB];
        for (text, id) in tiny_tokenizer()["model"]["vocab"].as_object().expect("an object") {
            tokens[id.as_u64().expect("a number") as usize] = text.clone();
        }
        tokens[256] = "<|im_start|>".into();
        tokens[257] = "<|im_end|>".into();
        let numbers = [
            ("llama.embedding_length", HIDDEN),
            ("llama.feed_forward_length", FFN),
            ("llama.block_count", LAYERS),
            ("llama.attention.head_count", HEADS),
            ("llama.attention.head_count_kv", KV_HEADS),
            ("llama.context_length", self.context),
            ("llama.rope.dimension_count", HEAD),
            ("tokenizer.ggml.eos_token_id", 257),
        ];
        out.extend((numbers.len() as u64 + 6).to_le_bytes());
        for (key, value) in numbers {
            write_string(out, key);
            out.extend(4u32.to_le_bytes());
            out.extend((value as u32).to_le_bytes());
        }
        for (key, value) in [
            ("general.architecture", "llama"),
            ("tokenizer.ggml.model", "gpt2"),
            ("tokenizer.ggml.pre", "gpt-2"),
        ] {
            write_string(out, key);
            out.extend(8u32.to_le_bytes());
            write_string(out, value);
        }
        write_string(out, "tokenizer.ggml.tokens");
        out.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
        out.extend((VOCAB as u64).to_le_bytes());
        tokens.iter().for_each(|t| write_string(out, t));
        write_string(out, "tokenizer.ggml.token_type");
        out.extend([9u32.to_le_bytes(), 5u32.to_le_bytes()].concat());
        out.extend((VOCAB as u64).to_le_bytes());
        (0..VOCAB).for_each(|i| out.extend(if i < 256 { 1i32 } else { 3 }.to_le_bytes()));
        write_string(out, "tokenizer.ggml.merges");
        out.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
        out.extend(0u64.to_le_bytes());
    }
}

/// Writes a string in GGUF's format.
fn write_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Returns a byte-level tokenizer without merges: each byte is a token.
fn tiny_tokenizer() -> serde_json::Value {
    // GPT-2's mapping of bytes to printable characters.
    let printable = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut vocab = serde_json::Map::new();
    let mut extra = 256;
    for b in 0..256u32 {
        let code = if printable(b) { b } else { extra };
        extra += u32::from(!printable(b));
        vocab.insert(char::from_u32(code).expect("below 512").to_string(), b.into());
    }
    let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let special = |id: u32, text: &str| {
        serde_json::json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                           "normalized": false, "special": true})
    };
    serde_json::json!({
        "version": "1.0", "added_tokens": [special(256, "<|im_start|>"), special(257, "<|im_end|>")],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": []}
    })
}

/// A worker in the test process that listens on 127.0.0.1.
#[derive(Debug)]
pub struct TestWorker {
    /// State of its API.
    pub app: std::sync::Arc<crate::api::App>,
    /// `http://127.0.0.1:PORT`.
    pub url: String,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

/// Options of a [`TestWorker`].
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Engine options.
    pub engine: crate::engine::EngineOptions,
    /// API settings.
    pub settings: crate::api::Settings,
    /// Size of the KV cache in bytes.
    pub kv_bytes: usize,
    /// Names and files of TorchScript modules.
    pub torchscript: Vec<(String, PathBuf)>,
}

impl Default for WorkerOptions {
    fn default() -> Self {
        Self {
            engine: Default::default(),
            settings: Default::default(),
            kv_bytes: 8 << 20,
            torchscript: Vec::new(),
        }
    }
}

impl TestWorker {
    /// Starts a worker with `models` (name, path).
    ///
    /// # Panics
    /// If the worker cannot start.
    pub async fn start(models: &[(&str, &std::path::Path)], options: WorkerOptions) -> Self {
        use crate::{api, metrics::Metrics, model, registry};
        let load = model::LoadOptions {
            device: tch::Device::Cpu,
            dtype: model::DtypeChoice::Auto,
            backend: model::BackendChoice::Auto,
            threads: 2,
            kv_bytes: Some(options.kv_bytes),
            max_context: None,
        };
        let metrics = Metrics::new();
        let torchscript =
            crate::torchscript::TorchScriptModules::load(&options.torchscript, tch::Device::Cpu)
                .expect("modules load");
        let registry = registry::ModelRegistry::new(load, options.engine, metrics.clone());
        let app = api::App::new(registry, torchscript, metrics, options.settings);
        for (name, path) in models {
            let spec = registry::ModelSpec {
                name: (*name).into(),
                version: None,
                path: (*path).into(),
                keep_old: false,
            };
            app.registry.load(spec).await.expect("the model loads");
        }
        app.phase.send_replace(api::Phase::Ready);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("bound"));
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let router = api::router(app.clone());
        tokio::spawn(api::serve::run(app.clone(), router, listener, None, async {
            let _ = stopped.await;
        }));
        Self { app, url, stop: Some(stop) }
    }

    /// Returns the engine of a model.
    ///
    /// # Panics
    /// If the model is not loaded.
    pub fn engine(&self, name: &str) -> std::sync::Arc<crate::engine::Engine> {
        self.app.engine(Some(name)).expect("the model is loaded")
    }

    /// Waits until no request is in flight and no KV block is used.
    ///
    /// # Panics
    /// If this takes more than 30 seconds.
    pub async fn wait_until_idle(&self, name: &str) {
        use std::sync::atomic::Ordering::Relaxed;
        let engine = self.engine(name);
        for _ in 0..3000 {
            let s = &engine.stats;
            if s.in_flight.load(Relaxed) == 0 && s.running.load(Relaxed) == 0 && s.kv_used.load(Relaxed) == 0
            {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        panic!("not idle after 30 seconds: {:?}", engine.stats);
    }
}

impl Drop for TestWorker {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }
}
