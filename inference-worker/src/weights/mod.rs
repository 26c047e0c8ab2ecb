//! Weight files: GGUF ([`gguf`]) and Hugging Face folders ([`hf`]), behind one [`WeightSource`].
//!
//! Input: a path. Output: named tensors as raw bytes over a memory map, plus the model's configuration
//! and what its tokenizer is built from. Called by `model::load`.

pub mod dtype;
pub mod gguf;
pub mod hf;

pub use dtype::DType;

use std::path::PathBuf;

/// A tensor as its file stores it: row-major, the last dimension contiguous.
#[derive(Debug, Clone)]
pub struct RawTensor<'a> {
    /// Element type of `bytes`.
    pub dtype: DType,
    /// Outermost dimension first (`[out, in]` for a linear layer).
    pub shape: Vec<usize>,
    /// The elements.
    pub bytes: &'a [u8],
}

impl RawTensor<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// All elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        self.dtype.dequantise(self.bytes, &mut out);
        out
    }
}

/// How a file orders the rows of the query and key projections within a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Hugging Face: element i rotates with i + head/2.
    Halves,
    /// llama.cpp: element 2i rotates with 2i + 1.
    Interleaved,
}

/// Something that holds a Llama's tensors under Hugging Face's names.
pub trait WeightSource {
    /// The tensor of that name, or None when the file has none.
    fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightError>;
    /// Row order of the query and key projections.
    fn rope_layout(&self) -> RopeLayout;
}

/// Why a weight file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// Reading failed.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what its name says, or is cut short.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where and how.
        what: String,
    },
    /// A tensor of a type that this worker cannot read.
    #[error(
        "tensor `{tensor}` has type {dtype}, which is not supported; supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K"
    )]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// Its type's name.
        dtype: String,
    },
    /// A model family that is not Llama.
    #[error(
        "architecture `{0}` is not supported: this worker serves the Llama architecture (`llama`, `LlamaForCausalLM`)"
    )]
    UnsupportedArchitecture(String),
    /// Metadata that the model needs is missing or absurd.
    #[error("model metadata: {0}")]
    Metadata(String),
    /// A tensor that the model needs is not there.
    #[error("tensor `{0}` is missing")]
    MissingTensor(String),
    /// A tensor's shape is not the one that the metadata call for.
    #[error("tensor `{tensor}` has shape {got:?}, expected {want:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        got: Vec<usize>,
        /// Shape by the metadata.
        want: Vec<usize>,
    },
}
