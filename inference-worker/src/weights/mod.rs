//! Weight files: GGUF ([`gguf`]) and Hugging Face directories ([`hf`]), with [`WeightSource`] as common interface.
//!
//! Input: a path. Output: memory-mapped tensors by name, and the metadata for configuration and tokenizer. Called by
//! `model`.

pub mod dtype;
pub mod gguf;
pub mod hf;

pub use dtype::DType;

use std::path::PathBuf;

/// A tensor as stored in its file: row-major, with the last dimension contiguous.
#[derive(Debug, Clone)]
pub struct RawTensor<'a> {
    /// Element type of `bytes`.
    pub dtype: DType,
    /// Dimensions, outermost first (`[out, in]` for a linear layer).
    pub shape: Vec<usize>,
    /// Bytes of the elements.
    pub bytes: &'a [u8],
}

impl RawTensor<'_> {
    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns all elements as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        self.dtype.dequantise(self.bytes, &mut out);
        out
    }
}

/// Order of the rows of the query and key projections within a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopeLayout {
    /// Hugging Face: element i is rotated with element i + head/2.
    Halves,
    /// llama.cpp: element 2i is rotated with element 2i + 1.
    Interleaved,
}

/// Access to the tensors of a Llama model by their Hugging Face names.
pub trait WeightSource {
    /// Returns the tensor `name`, or None if there is none.
    fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightError>;
    /// Returns the row order of the query and key projections.
    fn rope_layout(&self) -> RopeLayout;
}

/// Why weights cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// Reading failed.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// The file is truncated, or has another format than expected.
    #[error("cannot read {}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// A tensor has an unsupported type.
    #[error(
        "tensor `{tensor}` has type {dtype}, which is not supported; supported are F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K and Q6_K"
    )]
    UnsupportedType {
        /// The tensor.
        tensor: String,
        /// Name of its type.
        dtype: String,
    },
    /// The model does not have the Llama architecture.
    #[error(
        "architecture `{0}` is not supported: this worker serves the Llama architecture (`llama`, `LlamaForCausalLM`)"
    )]
    UnsupportedArchitecture(String),
    /// Metadata is missing or out of range.
    #[error("model metadata: {0}")]
    Metadata(String),
    /// A tensor is missing.
    #[error("tensor `{0}` is missing from the model")]
    MissingTensor(String),
    /// A tensor has another shape than the metadata says.
    #[error("tensor `{tensor}` has shape {got:?}, expected {want:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape in the file.
        got: Vec<usize>,
        /// Shape according to the metadata.
        want: Vec<usize>,
    },
}
