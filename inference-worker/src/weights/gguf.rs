//! GGUF files (versions 2 and 3, little-endian): metadata, tensor infos, and memory-mapped tensors.
//!
//! Input: a path. Output: [`Gguf`], which implements `WeightSource`. All lengths in the file are checked against its
//! size, so that a damaged or truncated file causes an error, and not a panic or a huge allocation. Source: the GGUF
//! specification.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use super::{DType, RawTensor, RopeLayout, WeightError, WeightSource};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the value types of GGUF, widened")]
pub enum MetadataValue {
    Int(i128),
    Float(f64),
    Bool(bool),
    Str(String),
    Strings(Vec<String>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    /// Arrays of bools or of arrays, which are not needed here.
    Other,
}

/// Type, shape and location of a tensor.
#[derive(Debug, Clone)]
struct TensorInfo {
    dtype: Result<DType, u32>,
    shape: Vec<usize>,
    offset: u64,
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    /// Metadata by key.
    pub metadata: HashMap<String, MetadataValue>,
    tensors: HashMap<String, TensorInfo>,
    data_start: usize,
}

/// Maximum number of dimensions, which is more than GGML supports.
const MAX_DIMS: u32 = 8;

impl Gguf {
    /// Maps and parses `path`.
    pub fn open(path: &Path) -> Result<Self, WeightError> {
        let io = |source| WeightError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only, and model files are replaced by rename instead of being edited in place. If
        // another process truncates a mapped file, this process gets SIGBUS, as with every loader that uses mmap.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let mut gguf =
            Self { path: path.into(), map, metadata: HashMap::new(), tensors: HashMap::new(), data_start: 0 };
        let mut reader = Reader { bytes: &gguf.map, at: 0 };
        let parsed = parse(&mut reader).map_err(|what| WeightError::Damaged { path: path.into(), what })?;
        (gguf.metadata, gguf.tensors, gguf.data_start) = parsed;
        gguf.check_extents()?;
        Ok(gguf)
    }

    /// Checks that all tensors are inside the file, so that a truncated file is found when it is loaded.
    fn check_extents(&self) -> Result<(), WeightError> {
        let mut names: Vec<_> = self.tensors.keys().collect();
        names.sort();
        for name in names {
            let info = &self.tensors[name];
            if info.dtype.is_ok() {
                self.slice(name, info)?;
            }
        }
        Ok(())
    }

    /// Returns the tensor of an info.
    fn slice(&self, name: &str, info: &TensorInfo) -> Result<RawTensor<'_>, WeightError> {
        let damaged = |what: String| WeightError::Damaged { path: self.path.clone(), what };
        let dtype = info.dtype.map_err(|id| WeightError::UnsupportedType {
            tensor: name.into(),
            dtype: format!("{} (GGML type {id})", DType::ggml_name(id)),
        })?;
        let elements =
            info.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(|| {
                damaged(format!("tensor `{name}` is too large: its shape is {:?}", info.shape))
            })?;
        let row = info.shape.last().copied().unwrap_or(1);
        let len =
            (row % dtype.block_elements() == 0).then(|| dtype.bytes_for(elements)).flatten().ok_or_else(
                || damaged(format!("tensor `{name}`: rows of {row} values are not whole {dtype:?} blocks")),
            )?;
        let start = usize::try_from(info.offset).ok().and_then(|o| o.checked_add(self.data_start));
        let bytes = start.and_then(|s| self.map.get(s..s.checked_add(len)?)).ok_or_else(|| {
            damaged(format!(
                "tensor `{name}` needs {len} bytes at offset {} of the data, but the file ends at byte {}; \
                 the file is truncated, fetch it again",
                info.offset,
                self.map.len()
            ))
        })?;
        Ok(RawTensor { dtype, shape: info.shape.clone(), bytes })
    }

    /// Returns the integer under `key`.
    pub fn int(&self, key: &str) -> Option<i64> {
        match self.metadata.get(key)? {
            MetadataValue::Int(v) => i64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// Returns the number under `key`.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            MetadataValue::Float(v) => Some(*v),
            MetadataValue::Int(v) => Some(*v as f64),
            _ => None,
        }
    }

    /// Returns the string under `key`.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            MetadataValue::Str(v) => Some(v),
            _ => None,
        }
    }

    /// Returns the bool under `key`.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            MetadataValue::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// Returns the strings under `key`.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.metadata.get(key)? {
            MetadataValue::Strings(v) => Some(v),
            _ => None,
        }
    }

    /// Returns the integers under `key`.
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.metadata.get(key)? {
            MetadataValue::Ints(v) => Some(v),
            _ => None,
        }
    }

    /// Returns the floats under `key`.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.metadata.get(key)? {
            MetadataValue::Floats(v) => Some(v),
            _ => None,
        }
    }

    /// Returns whether the file has a tensor with the llama.cpp name `name`.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns the tensor with the llama.cpp name `name`.
    pub fn raw(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightError> {
        self.tensors.get(name).map(|info| self.slice(name, info)).transpose()
    }
}

impl WeightSource for Gguf {
    fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightError> {
        let Some(own) = gguf_name(name) else { return Ok(None) };
        self.raw(&own)
    }

    fn rope_layout(&self) -> RopeLayout {
        RopeLayout::Interleaved
    }
}

/// Returns the llama.cpp name of a Hugging Face tensor.
pub(crate) fn gguf_name(name: &str) -> Option<String> {
    Some(match name {
        "model.embed_tokens.weight" => "token_embd.weight".into(),
        "model.norm.weight" => "output_norm.weight".into(),
        "lm_head.weight" => "output.weight".into(),
        _ => {
            let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
            let (module, kind) = rest.rsplit_once('.')?;
            let own = match module {
                "input_layernorm" => "attn_norm",
                "post_attention_layernorm" => "ffn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            format!("blk.{layer}.{own}.{kind}")
        }
    })
}

type Header = (HashMap<String, MetadataValue>, HashMap<String, TensorInfo>, usize);

fn parse(r: &mut Reader<'_>) -> Result<Header, String> {
    if r.take(4, "the magic number")? != b"GGUF" {
        return Err("not a GGUF file: it does not begin with `GGUF`".into());
    }
    let version = r.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(format!(
            "unsupported GGUF version {version}: only little-endian files of versions 2 and 3 are supported"
        ));
    }
    let tensor_count = r.count("the tensor count", 24)?;
    let kv_count = r.count("the metadata count", 13)?;
    let mut metadata = HashMap::with_capacity(kv_count);
    for i in 0..kv_count {
        let key = r.string(&format!("metadata key {i}"))?;
        let kind = r.u32(&format!("the type of `{key}`"))?;
        let value = r.value(kind, &key, 0)?;
        metadata.insert(key, value);
    }
    let mut tensors = HashMap::with_capacity(tensor_count);
    for i in 0..tensor_count {
        let name = r.string(&format!("the name of tensor {i}"))?;
        let dims = r.u32(&format!("the rank of `{name}`"))?;
        if dims > MAX_DIMS {
            return Err(format!("tensor `{name}` has {dims} dimensions, expected at most {MAX_DIMS}"));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let d = r.u64(&format!("a dimension of `{name}`"))?;
            shape.push(
                usize::try_from(d)
                    .map_err(|_| format!("tensor `{name}` has a dimension of {d}, which is too large"))?,
            );
        }
        shape.reverse(); // GGUF stores the contiguous dimension first
        let id = r.u32(&format!("the type of `{name}`"))?;
        let offset = r.u64(&format!("the offset of `{name}`"))?;
        tensors.insert(name, TensorInfo { dtype: DType::from_ggml(id).ok_or(id), shape, offset });
    }
    let alignment = match metadata.get("general.alignment") {
        Some(MetadataValue::Int(a)) if (1..=1 << 20).contains(a) => *a as usize,
        Some(other) => {
            return Err(format!("general.alignment is {other:?}, expected an integer from 1 to 1048576"));
        }
        None => 32,
    };
    Ok((metadata, tensors, r.at.next_multiple_of(alignment)))
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8], String> {
        let slice =
            self.at.checked_add(len).and_then(|end| self.bytes.get(self.at..end)).ok_or_else(|| {
                format!(
                    "the file ends at byte {} inside {what} (byte {}): it is truncated, fetch it again",
                    self.bytes.len(),
                    self.at
                )
            })?;
        self.at += len;
        Ok(slice)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Reads a count of items of at least `min_bytes` each, and checks that they fit into the rest of the file.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, String> {
        let n = self.u64(what)?;
        let room = (self.bytes.len() - self.at) / min_bytes;
        usize::try_from(n)
            .ok()
            .filter(|n| *n <= room)
            .ok_or_else(|| format!("{what} is {n}, which is more than the file has room for"))
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let len = self.count(what, 1)?;
        let bytes = self.take(len, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} is not UTF-8"))
    }

    /// Reads a metadata value of type `kind`.
    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<MetadataValue, String> {
        let what = &format!("the value of `{key}`");
        Ok(match kind {
            0 => MetadataValue::Int(self.array::<1>(what)?[0].into()),
            1 => MetadataValue::Int((self.array::<1>(what)?[0] as i8).into()),
            2 => MetadataValue::Int(u16::from_le_bytes(self.array(what)?).into()),
            3 => MetadataValue::Int(i16::from_le_bytes(self.array(what)?).into()),
            4 => MetadataValue::Int(self.u32(what)?.into()),
            5 => MetadataValue::Int(i32::from_le_bytes(self.array(what)?).into()),
            6 => MetadataValue::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => MetadataValue::Bool(self.array::<1>(what)?[0] != 0),
            8 => MetadataValue::Str(self.string(what)?),
            9 if depth < 4 => self.list(key, depth)?,
            10 => MetadataValue::Int(self.u64(what)?.into()),
            11 => MetadataValue::Int(i64::from_le_bytes(self.array(what)?).into()),
            12 => MetadataValue::Float(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(format!("`{key}` has the value type {kind}, which GGUF does not define")),
        })
    }

    /// Reads an array.
    fn list(&mut self, key: &str, depth: usize) -> Result<MetadataValue, String> {
        let what = &format!("the list `{key}`");
        let kind = self.u32(what)?;
        let len = self.count(what, if kind == 8 { 8 } else { 1 })?;
        let mut list = match kind {
            8 => MetadataValue::Strings(Vec::with_capacity(len)),
            0..=5 | 10 | 11 => MetadataValue::Ints(Vec::with_capacity(len)),
            6 | 12 => MetadataValue::Floats(Vec::with_capacity(len)),
            _ => MetadataValue::Other,
        };
        for _ in 0..len {
            match (&mut list, self.value(kind, key, depth + 1)?) {
                (MetadataValue::Strings(l), MetadataValue::Str(v)) => l.push(v),
                (MetadataValue::Ints(l), MetadataValue::Int(v)) => l.push(v as i64),
                (MetadataValue::Floats(l), MetadataValue::Float(v)) => l.push(v as f32),
                _ => {}
            }
        }
        Ok(list)
    }
}
