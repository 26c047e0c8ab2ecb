//! The models that this process serves, by name and version, and their replacement under load.
//!
//! Requests hold the engine they were given; a replaced engine ends by itself when its last request is done.
//! So a swap drops nothing, and a load that fails changes nothing. Called by the API and `main`.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use arc_swap::ArcSwap;
use tokio::sync::Mutex;

use crate::{
    engine::{Engine, EngineOptions},
    metrics::Metrics,
    model::{LoadError, LoadOptions},
};

/// The engines in service.
#[derive(Debug, Default, Clone)]
pub struct Models {
    /// By `name` the version in service, by `name@version` every version kept.
    engines: BTreeMap<String, Arc<Engine>>,
    /// What a request gets that names no model.
    default: Option<String>,
}

impl Models {
    /// The engine for a requested name; none named is the default.
    pub fn get(&self, name: Option<&str>) -> Option<&Arc<Engine>> {
        self.engines.get(name.or(self.default.as_deref())?)
    }

    /// Every name and its engine.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &Arc<Engine>)> {
        self.engines.iter()
    }

    /// Every engine once.
    pub fn engines(&self) -> impl Iterator<Item = &Arc<Engine>> {
        self.engines.iter().filter(|(name, _)| name.contains('@')).map(|(_, engine)| engine)
    }
}

/// The registry.
#[derive(Debug)]
pub struct Registry {
    models: ArcSwap<Models>,
    /// One load at a time: two would fight for memory.
    loading: Mutex<()>,
    load: LoadOptions,
    engine: EngineOptions,
    metrics: Arc<Metrics>,
}

/// A model to load.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Name for clients; must not contain `@`.
    pub name: String,
    /// Version; None counts up from the one in service.
    pub version: Option<String>,
    /// File or folder.
    pub path: PathBuf,
    /// Keep the versions that were there, under `name@version`.
    pub keep_old: bool,
}

/// Why a change was refused. Nothing has changed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The model did not load or warm up; what was in service still is.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A bad name.
    #[error(
        "model name `{0}` is not usable: it must be 1 to 200 characters without `@`, white space or control characters"
    )]
    Name(String),
    /// Not there.
    #[error("model `{0}` is not loaded")]
    Unknown(String),
    /// The last one stays.
    #[error("model `{0}` is the only one: load another before removing it")]
    Last(String),
}

impl Registry {
    /// An empty one; every model is loaded with the same options.
    pub fn new(load: LoadOptions, engine: EngineOptions, metrics: Arc<Metrics>) -> Self {
        Self { models: ArcSwap::default(), loading: Mutex::new(()), load, engine, metrics }
    }

    /// What is in service now.
    pub fn models(&self) -> arc_swap::Guard<Arc<Models>> {
        self.models.load()
    }

    /// Loads a model, warms it up, and puts it in service under its name.
    pub async fn load(&self, spec: Spec) -> Result<Arc<Engine>, RegistryError> {
        let odd = |c: char| c == '@' || c.is_whitespace() || c.is_control();
        if spec.name.is_empty() || spec.name.len() > 200 || spec.name.contains(odd) {
            return Err(RegistryError::Name(spec.name));
        }
        let _one_at_a_time = self.loading.lock().await;
        let version = spec.version.unwrap_or_else(|| self.next_version(&spec.name));
        let metrics = self.metrics.model(&spec.name);
        let (load, options) = (self.load.clone(), self.engine.clone());
        let engine =
            Engine::start(spec.name.clone(), version.clone(), spec.path, load, options, metrics).await?;
        let mut models = Models::clone(&self.models.load());
        let kept = format!("{}@", spec.name);
        if !spec.keep_old {
            models.engines.retain(|name, _| !name.starts_with(&kept));
        }
        models.engines.insert(format!("{kept}{version}"), engine.clone());
        models.engines.insert(spec.name.clone(), engine.clone());
        models.default.get_or_insert(spec.name);
        self.models.store(Arc::new(models));
        Ok(engine)
    }

    /// One more than the version in service, when that is a number.
    fn next_version(&self, name: &str) -> String {
        let models = self.models.load();
        let current = models.get(Some(name)).and_then(|e| e.version.parse::<u64>().ok());
        let mut next = current.unwrap_or(0) + 1;
        while models.get(Some(&format!("{name}@{next}"))).is_some() {
            next += 1;
        }
        next.to_string()
    }

    /// Takes a model, or one kept version of it, out of service. Its requests in flight are finished.
    pub async fn remove(&self, name: &str) -> Result<(), RegistryError> {
        let _one_at_a_time = self.loading.lock().await;
        let mut models = Models::clone(&self.models.load());
        let gone = models.engines.get(name).cloned().ok_or_else(|| RegistryError::Unknown(name.into()))?;
        let in_service = models.get(Some(&gone.name)).is_some_and(|e| Arc::ptr_eq(e, &gone));
        if in_service {
            let kept = format!("{}@", gone.name);
            models.engines.retain(|n, _| *n != gone.name && !n.starts_with(&kept));
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
