//! Hugging Face model folders: `config.json` and one or more `*.safetensors` files.
//!
//! Input: a folder. Output: [`HfFolder`], which implements `WeightSource` by Hugging Face's own names.

use std::{
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::{DType, RawTensor, RopeLayout, WeightError, WeightSource};

/// An open model folder.
#[derive(Debug)]
pub struct HfFolder {
    /// The folder.
    pub path: PathBuf,
    /// `config.json`.
    pub config: serde_json::Value,
    maps: Vec<Mmap>,
    tensors: HashMap<String, Place>,
}

#[derive(Debug)]
struct Place {
    file: usize,
    start: usize,
    len: usize,
    shape: Vec<usize>,
    dtype: Result<DType, String>,
}

impl HfFolder {
    /// Reads the configuration and maps every safetensors file of `path`.
    pub fn open(path: &Path) -> Result<Self, WeightError> {
        let config = read_json(&path.join("config.json"))?;
        let mut folder = Self { path: path.into(), config, maps: Vec::new(), tensors: HashMap::new() };
        let io = |source| WeightError::Io { path: path.into(), source };
        let mut files: Vec<PathBuf> = std::fs::read_dir(path)
            .map_err(io)?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
            .collect();
        files.sort();
        if files.is_empty() {
            return Err(WeightError::Metadata(format!(
                "{} holds no .safetensors file; weights in pickled .bin files are not read: convert them",
                path.display()
            )));
        }
        for file in files {
            folder.add(&file)?;
        }
        Ok(folder)
    }

    fn add(&mut self, path: &Path) -> Result<(), WeightError> {
        let io = |source| WeightError::Io { path: path.into(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: read-only; see `Gguf::open`.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let damaged = |e: safetensors::SafeTensorError| WeightError::Damaged {
            path: path.into(),
            what: format!("{e}; if it was downloaded, fetch it again"),
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
            let place = Place {
                file: self.maps.len(),
                start: view.data().as_ptr() as usize - base,
                len: view.data().len(),
                shape: view.shape().to_vec(),
                dtype,
            };
            self.tensors.insert(name, place);
        }
        drop(parsed);
        self.maps.push(map);
        Ok(())
    }
}

/// Reads a JSON file of a model folder.
pub fn read_json(path: &Path) -> Result<serde_json::Value, WeightError> {
    let bytes = std::fs::read(path).map_err(|source| WeightError::Io { path: path.into(), source })?;
    serde_json::from_slice(&bytes)
        .map_err(|e| WeightError::Damaged { path: path.into(), what: format!("not JSON: {e}") })
}

impl WeightSource for HfFolder {
    fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightError> {
        let Some(place) = self.tensors.get(name) else { return Ok(None) };
        let dtype = place
            .dtype
            .clone()
            .map_err(|dtype| WeightError::UnsupportedType { tensor: name.into(), dtype })?;
        let bytes = &self.maps[place.file][place.start..place.start + place.len];
        Ok(Some(RawTensor { dtype, shape: place.shape.clone(), bytes }))
    }

    fn rope_layout(&self) -> RopeLayout {
        RopeLayout::Halves
    }
}
