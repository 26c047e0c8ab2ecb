//! The models in service, by name and version, and their replacement without interruption.
//!
//! A request keeps a handle of its engine, and a replaced engine ends after its last request. Therefore replacing a
//! model does not interrupt requests, and a load that fails changes nothing. Called by the API and `main`.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::Mutex;

use crate::{
    engine::{Engine, EngineOptions},
    metrics::Metrics,
    model::{LoadError, LoadOptions},
};

/// The models in service.
#[derive(Debug, Default, Clone)]
pub struct ServedModels {
    /// `name` is the current version of a model, `name@version` any version.
    engines: BTreeMap<String, Arc<Engine>>,
    /// Name of the model for requests that name none.
    default: Option<String>,
}

impl ServedModels {
    /// Returns the engine of a model; None is the default model.
    pub fn get(&self, name: Option<&str>) -> Option<&Arc<Engine>> {
        self.engines.get(name.or(self.default.as_deref())?)
    }

    /// Returns all names with their engines.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Arc<Engine>)> {
        self.engines.iter()
    }

    /// Returns each engine once.
    pub fn engines(&self) -> impl Iterator<Item = &Arc<Engine>> {
        self.engines.iter().filter(|(name, _)| name.contains('@')).map(|(_, engine)| engine)
    }
}

/// Loads, replaces and removes models.
#[derive(Debug)]
pub struct ModelRegistry {
    models: ArcSwap<ServedModels>,
    /// Held during a load or a removal: two loads at once might not fit into memory.
    loading: Mutex<()>,
    load: LoadOptions,
    engine: EngineOptions,
    metrics: Arc<Metrics>,
}

/// A model to load.
#[derive(Debug, Clone)]
pub struct ModelSpec {
    /// Name for clients, without `@`.
    pub name: String,
    /// Version; None is one more than the current version.
    pub version: Option<String>,
    /// File or directory.
    pub path: PathBuf,
    /// Whether earlier versions stay available as `name@version`.
    pub keep_old: bool,
}

/// Why a change was rejected. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The model cannot be loaded, or its warm-up failed.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The name is not valid.
    #[error(
        "model name `{0}` is not valid: it must be 1 to 200 characters without `@`, white space or control characters"
    )]
    Name(String),
    /// There is no such model.
    #[error("model `{0}` is not loaded")]
    Unknown(String),
    /// The only model cannot be removed.
    #[error("model `{0}` is the only one: load another model before removing it")]
    Last(String),
}

impl ModelRegistry {
    /// Creates a registry without models. All models are loaded with the same options.
    pub fn new(load: LoadOptions, engine: EngineOptions, metrics: Arc<Metrics>) -> Self {
        Self { models: ArcSwap::default(), loading: Mutex::new(()), load, engine, metrics }
    }

    /// Returns the models in service.
    pub fn models(&self) -> arc_swap::Guard<Arc<ServedModels>> {
        self.models.load()
    }

    /// Loads a model, warms it up, and puts it into service under its name.
    pub async fn load(&self, spec: ModelSpec) -> Result<Arc<Engine>, RegistryError> {
        let is_invalid = |c: char| c == '@' || c.is_whitespace() || c.is_control();
        if spec.name.is_empty() || spec.name.len() > 200 || spec.name.contains(is_invalid) {
            return Err(RegistryError::Name(spec.name));
        }
        let _lock = self.loading.lock().await;
        let version = spec.version.unwrap_or_else(|| self.next_version(&spec.name));
        let metrics = self.metrics.model(&spec.name);
        let (load, options) = (self.load.clone(), self.engine.clone());
        let engine =
            Engine::start(spec.name.clone(), version.clone(), spec.path, load, options, metrics).await?;
        let mut models = ServedModels::clone(&self.models.load());
        let versions = format!("{}@", spec.name);
        if !spec.keep_old {
            models.engines.retain(|name, _| !name.starts_with(&versions));
        }
        models.engines.insert(format!("{versions}{version}"), engine.clone());
        models.engines.insert(spec.name.clone(), engine.clone());
        models.default.get_or_insert(spec.name);
        self.models.store(Arc::new(models));
        Ok(engine)
    }

    /// Returns one more than the current version of a model, or 1 if it is not a number.
    fn next_version(&self, name: &str) -> String {
        let models = self.models.load();
        let current = models.get(Some(name)).and_then(|e| e.version.parse::<u64>().ok());
        let mut next = current.unwrap_or(0) + 1;
        while models.get(Some(&format!("{name}@{next}"))).is_some() {
            next += 1;
        }
        next.to_string()
    }

    /// Removes a model, or an earlier version of it. Its requests in flight are completed.
    pub async fn remove(&self, name: &str) -> Result<(), RegistryError> {
        let _lock = self.loading.lock().await;
        let mut models = ServedModels::clone(&self.models.load());
        let removed = models.engines.get(name).cloned().ok_or_else(|| RegistryError::Unknown(name.into()))?;
        let in_service = models.get(Some(&removed.name)).is_some_and(|e| Arc::ptr_eq(e, &removed));
        if in_service {
            let versions = format!("{}@", removed.name);
            models.engines.retain(|n, _| *n != removed.name && !n.starts_with(&versions));
        } else {
            models.engines.remove(name);
        }
        if models.engines.is_empty() {
            return Err(RegistryError::Last(name.into()));
        }
        if models.default.as_ref().is_some_and(|d| !models.engines.contains_key(d)) {
            models.default = models.engines.keys().find(|n| !n.contains('@')).cloned();
        }
        self.models.store(Arc::new(models));
        Ok(())
    }
}
