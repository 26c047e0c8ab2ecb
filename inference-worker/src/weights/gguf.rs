//! GGUF files (versions 2 and 3, little-endian): metadata, tensor table, and tensors over a memory map.
//!
//! Input: a path. Output: [`Gguf`], which implements `WeightSource` under Hugging Face's tensor names.
//! Every length in the file is checked against the file's size before it is believed, so that a broken
//! or truncated file is an error and never a panic or a huge allocation. Source: the GGUF specification.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use super::{DType, RawTensor, RopeLayout, WeightError, WeightSource};

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
#[expect(missing_docs, reason = "the GGUF value kinds, widened")]
pub enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Str(String),
    Strings(Vec<String>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    /// Arrays of bools or of arrays: present but not needed here.
    Other,
}

/// Where a tensor lies.
#[derive(Debug, Clone)]
struct Entry {
    dtype: Result<DType, u32>,
    shape: Vec<usize>,
    offset: u64,
}

/// An open GGUF file.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    /// All metadata by key.
    pub metadata: HashMap<String, Value>,
    tensors: HashMap<String, Entry>,
    data_start: usize,
}

/// More dimensions than GGML knows.
const MAX_DIMS: u32 = 8;

impl Gguf {
    /// Maps and parses `path`.
    pub fn open(path: &Path) -> Result<Self, WeightError> {
        let io = |source| WeightError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is read-only; model files are replaced by rename, not edited in place. A file
        // truncated by someone else while mapped would raise SIGBUS, as with every mmap-based loader.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let mut gguf =
            Self { path: path.into(), map, metadata: HashMap::new(), tensors: HashMap::new(), data_start: 0 };
        let mut reader = Reader { bytes: &gguf.map, at: 0 };
        let parsed = parse(&mut reader).map_err(|what| WeightError::Damaged { path: path.into(), what })?;
        (gguf.metadata, gguf.tensors, gguf.data_start) = parsed;
        gguf.check_extents()?;
        Ok(gguf)
    }

    /// Every tensor must lie inside the file: a truncated download is found at load, not at first use.
    fn check_extents(&self) -> Result<(), WeightError> {
        let mut names: Vec<_> = self.tensors.keys().collect();
        names.sort();
        for name in names {
            let entry = &self.tensors[name];
            if entry.dtype.is_ok() {
                self.slice(name, entry)?;
            }
        }
        Ok(())
    }

    fn slice(&self, name: &str, entry: &Entry) -> Result<RawTensor<'_>, WeightError> {
        let damaged = |what: String| WeightError::Damaged { path: self.path.clone(), what };
        let dtype = entry.dtype.map_err(|id| WeightError::UnsupportedType {
            tensor: name.into(),
            dtype: format!("{} (GGML type {id})", DType::ggml_name(id)),
        })?;
        let elements =
            entry.shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).ok_or_else(|| {
                damaged(format!("tensor `{name}` has an impossible shape {:?}", entry.shape))
            })?;
        let row = entry.shape.last().copied().unwrap_or(1);
        let len =
            (row % dtype.block_elements() == 0).then(|| dtype.bytes_for(elements)).flatten().ok_or_else(
                || damaged(format!("tensor `{name}`: rows of {row} values are no whole {dtype:?} blocks")),
            )?;
        let start = usize::try_from(entry.offset).ok().and_then(|o| o.checked_add(self.data_start));
        let bytes = start.and_then(|s| self.map.get(s..s.checked_add(len)?)).ok_or_else(|| {
            damaged(format!(
                "tensor `{name}` needs {len} bytes at offset {} of the data, but the file ends at byte {}; \
                 the file is truncated, fetch it again",
                entry.offset,
                self.map.len()
            ))
        })?;
        Ok(RawTensor { dtype, shape: entry.shape.clone(), bytes })
    }

    /// The integer under `key`.
    pub fn int(&self, key: &str) -> Option<i64> {
        match self.metadata.get(key)? {
            Value::Int(v) => i64::try_from(*v).ok(),
            _ => None,
        }
    }

    /// The number under `key`.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key)? {
            Value::Float(v) => Some(*v),
            Value::Int(v) => Some(*v as f64),
            _ => None,
        }
    }

    /// The text under `key`.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key)? {
            Value::Str(v) => Some(v),
            _ => None,
        }
    }

    /// The flag under `key`.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key)? {
            Value::Bool(v) => Some(*v),
            _ => None,
        }
    }

    /// The list of texts under `key`.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.metadata.get(key)? {
            Value::Strings(v) => Some(v),
            _ => None,
        }
    }

    /// The list of integers under `key`.
    pub fn ints(&self, key: &str) -> Option<&[i64]> {
        match self.metadata.get(key)? {
            Value::Ints(v) => Some(v),
            _ => None,
        }
    }

    /// The list of floats under `key`.
    pub fn floats(&self, key: &str) -> Option<&[f32]> {
        match self.metadata.get(key)? {
            Value::Floats(v) => Some(v),
            _ => None,
        }
    }

    /// Whether the file has a tensor of llama.cpp's name `name`.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of llama.cpp's name `name`.
    pub fn raw(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightError> {
        self.tensors.get(name).map(|entry| self.slice(name, entry)).transpose()
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

/// llama.cpp's name of a Hugging Face tensor.
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

type Parsed = (HashMap<String, Value>, HashMap<String, Entry>, usize);

fn parse(r: &mut Reader<'_>) -> Result<Parsed, String> {
    if r.take(4, "the magic number")? != b"GGUF" {
        return Err("it does not begin with `GGUF`: this is no GGUF file".into());
    }
    let version = r.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(format!("GGUF version {version} (2 and 3 are read; big-endian files are not)"));
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
            return Err(format!("tensor `{name}` has {dims} dimensions"));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let d = r.u64(&format!("a dimension of `{name}`"))?;
            shape.push(usize::try_from(d).map_err(|_| format!("tensor `{name}`: dimension {d}"))?);
        }
        shape.reverse(); // GGUF writes the contiguous dimension first
        let id = r.u32(&format!("the type of `{name}`"))?;
        let offset = r.u64(&format!("the offset of `{name}`"))?;
        tensors.insert(name, Entry { dtype: DType::from_ggml(id).ok_or(id), shape, offset });
    }
    let alignment = match metadata.get("general.alignment") {
        Some(Value::Int(a)) if (1..=1 << 20).contains(a) => *a as usize,
        Some(other) => return Err(format!("general.alignment is {other:?}")),
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
                    "it ends at byte {} inside {what} (byte {}); fetch it again",
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

    /// A count of things of at least `min_bytes` each: more than the rest of the file can hold is damage.
    fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, String> {
        let n = self.u64(what)?;
        let room = (self.bytes.len() - self.at) / min_bytes;
        usize::try_from(n)
            .ok()
            .filter(|n| *n <= room)
            .ok_or_else(|| format!("{what} is {n}, more than the file can hold"))
    }

    fn string(&mut self, what: &str) -> Result<String, String> {
        let len = self.count(what, 1)?;
        let bytes = self.take(len, what)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn value(&mut self, kind: u32, key: &str, depth: usize) -> Result<Value, String> {
        let what = &format!("the value of `{key}`");
        Ok(match kind {
            0 => Value::Int(self.array::<1>(what)?[0].into()),
            1 => Value::Int((self.array::<1>(what)?[0] as i8).into()),
            2 => Value::Int(u16::from_le_bytes(self.array(what)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(what)?).into()),
            4 => Value::Int(self.u32(what)?.into()),
            5 => Value::Int(i32::from_le_bytes(self.array(what)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(what)?).into()),
            7 => Value::Bool(self.array::<1>(what)?[0] != 0),
            8 => Value::Str(self.string(what)?),
            9 if depth < 4 => self.list(key, depth)?,
            10 => Value::Int(self.u64(what)?.into()),
            11 => Value::Int(i64::from_le_bytes(self.array(what)?).into()),
            12 => Value::Float(f64::from_le_bytes(self.array(what)?)),
            _ => return Err(format!("`{key}` has value type {kind}, which GGUF does not define")),
        })
    }

    fn list(&mut self, key: &str, depth: usize) -> Result<Value, String> {
        let what = &format!("the list `{key}`");
        let kind = self.u32(what)?;
        let len = self.count(what, if kind == 8 { 8 } else { 1 })?;
        let mut list = match kind {
            8 => Value::Strings(Vec::with_capacity(len)),
            0..=5 | 10 | 11 => Value::Ints(Vec::with_capacity(len)),
            6 | 12 => Value::Floats(Vec::with_capacity(len)),
            _ => Value::Other,
        };
        for _ in 0..len {
            match (&mut list, self.value(kind, key, depth + 1)?) {
                (Value::Strings(l), Value::Str(v)) => l.push(v),
                (Value::Ints(l), Value::Int(v)) => l.push(v as i64),
                (Value::Floats(l), Value::Float(v)) => l.push(v as f32),
                _ => {}
            }
        }
        Ok(list)
    }
}
