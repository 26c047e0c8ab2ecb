//! Loads a model: configuration, tokenizer, chat template, and a backend with the weights.
//!
//! Input: a path (GGUF file or Hugging Face directory) and [`LoadOptions`]. Output: a [`Model`]. Called by the
//! engine's thread at start-up and when a model is replaced; loading blocks for seconds.

mod config;
pub mod tensors;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub use config::{LlamaConfig, RopeScaling};
use tch::{Device, Kind};

use crate::{
    backend::{BLOCK_SIZE, Backend, native::NativeBackend, torch::TorchBackend},
    chat_template::{CHATML, ChatTemplate, ChatTemplateError},
    tokenizer::{TextTokenizer, TokenizerError},
    weights::{
        WeightError, WeightSource,
        gguf::Gguf,
        hf::{HfDirectory, read_json},
    },
};

/// Type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeChoice {
    /// The type in the file on the CPU, bf16 on CUDA
    Auto,
    /// Dequantised to f32
    F32,
    /// f16, with the libtorch backend
    F16,
    /// bf16, with the libtorch backend
    Bf16,
}

/// Backend that computes the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// The native backend on the CPU, libtorch on CUDA and for f16 and bf16
    Auto,
    /// This program's own kernels, on the CPU
    Native,
    /// libtorch, on the CPU and on CUDA
    Torch,
}

/// Options for loading a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Device that computes the model.
    pub device: Device,
    /// Type of the weights.
    pub dtype: DtypeChoice,
    /// Backend that computes the model.
    pub backend: BackendChoice,
    /// Compute threads on the CPU.
    pub threads: usize,
    /// Size of the KV cache in bytes; None is 1 GiB on the CPU, and 85 % of the free memory on CUDA.
    pub kv_bytes: Option<usize>,
    /// Maximum context length; None is that of the model.
    pub max_context: Option<usize>,
}

/// A loaded model.
pub struct Model {
    /// Configuration.
    pub config: LlamaConfig,
    /// Tokenizer.
    pub tokenizer: Arc<TextTokenizer>,
    /// Chat template.
    pub template: ChatTemplate,
    /// Weights on a device.
    pub backend: Box<dyn Backend>,
    /// Maximum context length: that of the model, limited by the options and by the KV cache.
    pub max_context: usize,
    /// Ids of the end tokens.
    pub eos: Vec<u32>,
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The weights cannot be used.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template cannot be used.
    #[error(transparent)]
    Chat(#[from] ChatTemplateError),
    /// Path, device or options are not usable.
    #[error("{0}")]
    Options(String),
}

/// The files of a model.
enum ModelFiles {
    Gguf(Box<Gguf>),
    Directory(HfDirectory),
}

impl ModelFiles {
    fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() {
            // Reports an unsupported architecture before problems with the weights.
            LlamaConfig::from_hf(&read_json(&path.join("config.json"))?)?;
            return Ok(Self::Directory(HfDirectory::open(path)?));
        }
        if !path.exists() {
            return Err(LoadError::Options(format!(
                "no model at {}: no such file or directory",
                path.display()
            )));
        }
        Ok(Self::Gguf(Box::new(Gguf::open(path)?)))
    }

    fn weights(&self) -> &dyn WeightSource {
        match self {
            Self::Gguf(g) => &**g,
            Self::Directory(f) => f,
        }
    }

    fn config(&self) -> Result<LlamaConfig, WeightError> {
        match self {
            Self::Gguf(g) => LlamaConfig::from_gguf(g),
            Self::Directory(f) => LlamaConfig::from_hf(&f.config),
        }
    }

    fn tokenizer(&self) -> Result<TextTokenizer, TokenizerError> {
        match self {
            Self::Gguf(g) => TextTokenizer::from_gguf(g),
            Self::Directory(f) => TextTokenizer::from_directory(&f.path),
        }
    }

    fn template(&self) -> Option<String> {
        match self {
            Self::Gguf(g) => g.str("tokenizer.chat_template").map(str::to_owned),
            Self::Directory(f) => {
                if let Ok(text) = std::fs::read_to_string(f.path.join("chat_template.jinja")) {
                    return Some(text);
                }
                let config = read_json(&f.path.join("tokenizer_config.json")).ok()?;
                match &config["chat_template"] {
                    serde_json::Value::String(text) => Some(text.clone()),
                    serde_json::Value::Array(named) => {
                        let default = named.iter().find(|t| t["name"] == "default")?;
                        default["template"].as_str().map(str::to_owned)
                    }
                    _ => None,
                }
            }
        }
    }

    /// Returns the end tokens of `generation_config.json`.
    fn generation_eos(&self) -> Vec<u32> {
        let Self::Directory(f) = self else { return Vec::new() };
        read_json(&f.path.join("generation_config.json"))
            .map(|g| config::eos_ids(&g["eos_token_id"]))
            .unwrap_or_default()
    }
}

/// Loads the model at `path`.
pub fn load_model(path: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
    let files = ModelFiles::open(path)?;
    let config = files.config()?;
    let tokenizer = files.tokenizer()?;
    tokenizer.check_against(config.vocab)?;
    let template = files.template().unwrap_or_else(|| CHATML.into());
    let template = ChatTemplate::new(&template, &tokenizer.bos, &tokenizer.eos)?;
    let mut eos = config.eos.clone();
    eos.extend(files.generation_eos());
    eos.extend(
        ["<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"]
            .iter()
            .filter_map(|t| tokenizer.token_id(t)),
    );
    eos.sort_unstable();
    eos.dedup();
    let backend = make_backend(files.weights(), &config, options)?;
    let cache = backend.kv_blocks() * BLOCK_SIZE;
    let max_context = options.max_context.unwrap_or(config.context).min(config.context);
    Ok(Model {
        max_context: max_context.min(cache),
        config,
        tokenizer: Arc::new(tokenizer),
        template,
        backend,
        eos,
    })
}

fn make_backend(
    source: &dyn WeightSource,
    c: &LlamaConfig,
    o: &LoadOptions,
) -> Result<Box<dyn Backend>, LoadError> {
    if o.device.is_cuda() {
        let count = tch::Cuda::device_count();
        let Device::Cuda(index) = o.device else { unreachable!("is_cuda") };
        if index as i64 >= count {
            return Err(LoadError::Options(format!(
                "device cuda:{index} not found: libtorch sees {count} CUDA devices. CUDA needs a GPU, its driver and a \
                 libtorch built with CUDA; without them use --device cpu"
            )));
        }
    }
    let is_16_bit = matches!(o.dtype, DtypeChoice::F16 | DtypeChoice::Bf16);
    let native = match o.backend {
        BackendChoice::Auto => !o.device.is_cuda() && !is_16_bit,
        BackendChoice::Native if o.device.is_cuda() || is_16_bit => {
            return Err(LoadError::Options(
                "the native backend needs --device cpu and --dtype auto or f32; for others use --backend torch"
                    .into(),
            ));
        }
        BackendChoice::Native => true,
        BackendChoice::Torch => false,
    };
    let kind = match o.dtype {
        DtypeChoice::Auto if o.device.is_cuda() => Kind::BFloat16,
        DtypeChoice::Auto | DtypeChoice::F32 => Kind::Float,
        DtypeChoice::F16 => Kind::Half,
        DtypeChoice::Bf16 => Kind::BFloat16,
    };
    let element = if native { 4 } else { kind.elt_size_in_bytes() };
    let block_bytes = BLOCK_SIZE * c.kv_dim() * 2 * c.layers * element;
    let blocks = kv_cache_bytes(c, o, element) / block_bytes;
    if blocks < 2 {
        return Err(LoadError::Options(format!(
            "the KV cache has only {blocks} blocks of {block_bytes} bytes, and at least 2 are needed: raise --kv-cache-mib"
        )));
    }
    Ok(if native {
        Box::new(NativeBackend::load(source, c, o.threads, blocks, o.dtype == DtypeChoice::F32)?)
    } else {
        Box::new(TorchBackend::load(source, c, o.device, kind, blocks)?)
    })
}

/// Returns the size of the KV cache in bytes.
fn kv_cache_bytes(c: &LlamaConfig, o: &LoadOptions, element: usize) -> usize {
    if let Some(bytes) = o.kv_bytes {
        return bytes;
    }
    if let Device::Cuda(_) = o.device {
        let parameters = 2 * c.vocab * c.hidden
            + c.layers * (2 * c.hidden * (c.q_dim() + c.kv_dim()) + 3 * c.ffn * c.hidden);
        let free = crate::cuda::free_memory().unwrap_or(8 << 30).saturating_sub(parameters * element);
        return free / 100 * 85;
    }
    1 << 30
}

/// Returns the name of a model that has no explicit name: the file name without its extension, or the directory name.
pub fn default_name(path: &Path) -> String {
    let stem: PathBuf = if path.is_dir() { path.into() } else { path.with_extension("") };
    stem.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}
