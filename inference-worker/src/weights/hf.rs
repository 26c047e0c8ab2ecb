//! Hugging Face model directories: `config.json` and one or more `*.safetensors` files.
//!
//! Input: a directory. Output: [`HfDirectory`], which implements `WeightSource`.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::{DType, RawTensor, RopeLayout, WeightError, WeightSource};

/// An open model directory.
#[derive(Debug)]
pub struct HfDirectory {
    /// The directory.
    pub path: PathBuf,
    /// Contents of `config.json`.
    pub config: serde_json::Value,
    maps: Vec<Mmap>,
    tensors: HashMap<String, TensorLocation>,
}

/// Location and type of a tensor.
#[derive(Debug)]
struct TensorLocation {
    file: usize,
    start: usize,
    len: usize,
    shape: Vec<usize>,
    dtype: Result<DType, String>,
}

impl HfDirectory {
    /// Reads the configuration and maps all safetensors files in `path`.
    pub fn open(path: &Path) -> Result<Self, WeightError> {
        let config = read_json(&path.join("config.json"))?;
        let mut directory = Self { path: path.into(), config, maps: Vec::new(), tensors: HashMap::new() };
        let io = |source| WeightError::Io { path: path.into(), source };
        let mut files: Vec<PathBuf> = std::fs::read_dir(path)
            .map_err(io)?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        if files.is_empty() {
            return Err(WeightError::Metadata(format!(
                "{} has no .safetensors file; if it has .bin files, convert them to safetensors",
                path.display()
            )));
        }
        for file in files {
            directory.add(&file)?;
        }
        Ok(directory)
    }

    /// Maps a safetensors file.
    fn add(&mut self, path: &Path) -> Result<(), WeightError> {
        let io = |source| WeightError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: read-only; see `Gguf::open`.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let damaged = |e: safetensors::SafeTensorError| WeightError::Damaged {
            path: path.into(),
            what: format!("{e}; the file may be truncated, fetch it again"),
        };
        let parsed = SafeTensors::deserialize(&map).map_err(damaged)?;
        let base = map.as_ptr() as usize;
        for (name, view) in parsed.tensors() {
            let dtype = match view.dtype() {
                Dtype::F32 => Ok(DType::F32),
                Dtype::F16 => Ok(DType::F16),
                Dtype::BF16 => Ok(DType::BF16),
                other => Err(format!("{other:?}")),
            };
            let location = TensorLocation {
                file: self.maps.len(),
                start: view.data().as_ptr() as usize - base,
                len: view.data().len(),
                shape: view.shape().to_vec(),
                dtype,
            };
            self.tensors.insert(name, location);
        }
        drop(parsed);
        self.maps.push(map);
        Ok(())
    }
}

/// Reads a JSON file of a model directory.
pub fn read_json(path: &Path) -> Result<serde_json::Value, WeightError> {
    let bytes = std::fs::read(path).map_err(|source| WeightError::Io { path: path.into(), source })?;
    serde_json::from_slice(&bytes)
        .map_err(|e| WeightError::Damaged { path: path.into(), what: format!("not valid JSON: {e}") })
}

impl WeightSource for HfDirectory {
    fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightError> {
        let Some(location) = self.tensors.get(name) else { return Ok(None) };
        let dtype = location
            .dtype
            .clone()
            .map_err(|dtype| WeightError::UnsupportedType { tensor: name.into(), dtype })?;
        let bytes = &self.maps[location.file][location.start..location.start + location.len];
        Ok(Some(RawTensor { dtype, shape: location.shape.clone(), bytes }))
    }

    fn rope_layout(&self) -> RopeLayout {
        RopeLayout::Halves
    }
}
