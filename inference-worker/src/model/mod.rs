//! Loading a model: configuration, tokenizer, chat template and a backend with its weights.
//!
//! Input: a path (GGUF file or Hugging Face folder) and [`LoadOptions`]. Output: a [`Model`]. Called by the
//! registry, at start-up and for hot swaps; it blocks for seconds and so belongs on a thread of its own.

mod config;
pub mod load;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

pub use config::{LlamaConfig, RopeScaling};
use tch::{Device, Kind};

use crate::{
    backend::{BLOCK, Backend, native::NativeBackend, torch::TorchBackend},
    chat::{CHATML, ChatError, ChatTemplate},
    tokenizer::{TextTokenizer, TokenizerError},
    weights::{
        WeightError, WeightSource,
        gguf::Gguf,
        hf::{HfFolder, read_json},
    },
};

/// Float type of the weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeChoice {
    /// The file's own type on the CPU, bf16 on CUDA.
    Auto,
    /// Dequantised to f32.
    F32,
    /// f16 (libtorch backend).
    F16,
    /// bf16 (libtorch backend).
    Bf16,
}

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum BackendChoice {
    /// This crate's kernels on the CPU, libtorch on CUDA and for 16-bit floats.
    Auto,
    /// This crate's kernels.
    Native,
    /// libtorch.
    Torch,
}

/// How to load a model.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Where it runs.
    pub device: Device,
    /// Float type.
    pub dtype: DtypeChoice,
    /// Who computes.
    pub backend: BackendChoice,
    /// Compute threads on the CPU.
    pub threads: usize,
    /// KV-cache budget in bytes; None is 1 GiB on the CPU, 85 % of the free memory on CUDA.
    pub kv_bytes: Option<usize>,
    /// Upper bound of the context length.
    pub max_context: Option<usize>,
}

/// A model ready to run.
pub struct Model {
    /// Shape and constants.
    pub config: LlamaConfig,
    /// Its tokenizer.
    pub tokenizer: Arc<TextTokenizer>,
    /// Its chat template.
    pub template: ChatTemplate,
    /// Its weights on a device.
    pub backend: Box<dyn Backend>,
    /// Longest sequence served: the model's context, cut by options and by the KV budget.
    pub max_context: usize,
    /// Ids that end a generation.
    pub eos: Vec<u32>,
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The weights.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// Path, device or options.
    #[error("{0}")]
    Options(String),
}

/// Whatever a path held.
enum Files {
    Gguf(Box<Gguf>),
    Folder(HfFolder),
}

impl Files {
    fn open(path: &Path) -> Result<Self, LoadError> {
        if path.is_dir() {
            // Said before anything about its weights: a model that cannot be served.
            LlamaConfig::from_hf(&read_json(&path.join("config.json"))?)?;
            return Ok(Self::Folder(HfFolder::open(path)?));
        }
        if !path.exists() {
            return Err(LoadError::Options(format!("no model at {}", path.display())));
        }
        Ok(Self::Gguf(Box::new(Gguf::open(path)?)))
    }

    fn weights(&self) -> &dyn WeightSource {
        match self {
            Self::Gguf(g) => &**g,
            Self::Folder(f) => f,
        }
    }

    fn config(&self) -> Result<LlamaConfig, WeightError> {
        match self {
            Self::Gguf(g) => LlamaConfig::from_gguf(g),
            Self::Folder(f) => LlamaConfig::from_hf(&f.config),
        }
    }

    fn tokenizer(&self) -> Result<TextTokenizer, TokenizerError> {
        match self {
            Self::Gguf(g) => TextTokenizer::from_gguf(g),
            Self::Folder(f) => TextTokenizer::from_folder(&f.path),
        }
    }

    fn template(&self) -> Option<String> {
        match self {
            Self::Gguf(g) => g.str("tokenizer.chat_template").map(str::to_owned),
            Self::Folder(f) => {
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

    fn extra_eos(&self) -> Vec<u32> {
        let Self::Folder(f) = self else { return Vec::new() };
        read_json(&f.path.join("generation_config.json"))
            .map(|g| config::eos_ids(&g["eos_token_id"]))
            .unwrap_or_default()
    }
}

/// Loads the model at `path`.
pub fn load_model(path: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
    let files = Files::open(path)?;
    let config = files.config()?;
    let tokenizer = files.tokenizer()?;
    tokenizer.check_against(config.vocab)?;
    let template = files.template().unwrap_or_else(|| CHATML.into());
    let template = ChatTemplate::new(&template, &tokenizer.bos, &tokenizer.eos)?;
    let mut eos = config.eos.clone();
    eos.extend(files.extra_eos());
    eos.extend(
        ["<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>"]
            .iter()
            .filter_map(|t| tokenizer.token_id(t)),
    );
    eos.sort_unstable();
    eos.dedup();
    let backend = make_backend(files.weights(), &config, options)?;
    let cache = backend.kv_blocks() * BLOCK;
    let wanted = options.max_context.unwrap_or(config.context).min(config.context);
    Ok(Model {
        max_context: wanted.min(cache),
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
                "device cuda:{index} is not there: libtorch sees {count} CUDA devices (a CUDA build of libtorch, \
                 a driver and a GPU are needed); use --device cpu"
            )));
        }
    }
    let sixteen = matches!(o.dtype, DtypeChoice::F16 | DtypeChoice::Bf16);
    let native = match o.backend {
        BackendChoice::Auto => !o.device.is_cuda() && !sixteen,
        BackendChoice::Native if o.device.is_cuda() || sixteen => {
            return Err(LoadError::Options(
                "the native backend runs on the CPU with the file's own weights or f32: use --backend torch"
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
    let block_bytes = BLOCK * c.kv_dim() * 2 * c.layers * element;
    let blocks = kv_budget(c, o, element) / block_bytes;
    if blocks < 2 {
        return Err(LoadError::Options(format!(
            "the KV cache holds {blocks} blocks of {block_bytes} bytes, at least 2 are needed: raise --kv-cache-mib"
        )));
    }
    Ok(if native {
        Box::new(NativeBackend::load(source, c, o.threads, blocks, o.dtype == DtypeChoice::F32)?)
    } else {
        Box::new(TorchBackend::load(source, c, o.device, kind, blocks)?)
    })
}

/// Bytes for the KV cache.
fn kv_budget(c: &LlamaConfig, o: &LoadOptions, element: usize) -> usize {
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

/// A model's name when the user gives none: the file's or folder's.
pub fn default_name(path: &Path) -> String {
    let stem: PathBuf = if path.is_dir() { path.into() } else { path.with_extension("") };
    stem.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}
