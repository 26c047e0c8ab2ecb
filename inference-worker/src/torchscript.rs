//! Runs TorchScript modules, each on its own thread.
//!
//! Input: a `.pt` or `.jit` file, and arguments. Output: the results as tensors. Called by the Open Inference Protocol
//! endpoints.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{SyncSender, TrySendError, sync_channel},
    },
};

use tch::{CModule, Device, IValue, Tensor};
use tokio::sync::oneshot;

/// Maximum number of calls that wait for a module.
const QUEUE: usize = 64;

/// An argument of a call.
pub enum Argument {
    /// A tensor.
    Tensor(Tensor),
    /// An int.
    Int(i64),
    /// A float.
    Float(f64),
    /// A bool.
    Bool(bool),
}

/// Why a module cannot be loaded or a call failed.
#[derive(Debug, thiserror::Error)]
pub enum TorchScriptError {
    /// There is no such module.
    #[error("module `{0}` is not loaded")]
    Unknown(String),
    /// The queue of the module is full.
    #[error("{QUEUE} calls are already waiting for this module")]
    Full,
    /// The module raised an error.
    #[error("{0}")]
    Failed(String),
    /// The module cannot be loaded.
    #[error("cannot load TorchScript module {}: {what}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// The error of libtorch.
        what: String,
    },
}

type Reply = oneshot::Sender<Result<Vec<Tensor>, TorchScriptError>>;
type Call = (Vec<Argument>, Reply);

/// The loaded modules, by name.
#[derive(Debug, Default, Clone)]
pub struct TorchScriptModules {
    modules: Arc<BTreeMap<String, SyncSender<Call>>>,
}

impl TorchScriptModules {
    /// Loads modules. Each one is called by one thread only, because a module may keep state between calls.
    pub fn load(files: &[(String, PathBuf)], device: Device) -> Result<Self, TorchScriptError> {
        let mut modules = BTreeMap::new();
        for (name, path) in files {
            modules.insert(name.clone(), start(name, path, device)?);
        }
        Ok(Self { modules: Arc::new(modules) })
    }

    /// Returns whether the module `name` is loaded.
    pub fn has(&self, name: &str) -> bool {
        self.modules.contains_key(name)
    }

    /// Returns the names of all modules.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.modules.keys()
    }

    /// Calls a module's `forward`.
    pub async fn call(&self, name: &str, arguments: Vec<Argument>) -> Result<Vec<Tensor>, TorchScriptError> {
        let module = self.modules.get(name).ok_or_else(|| TorchScriptError::Unknown(name.into()))?;
        let (reply, result) = oneshot::channel();
        module.try_send((arguments, reply)).map_err(|e| match e {
            TrySendError::Full(_) => TorchScriptError::Full,
            TrySendError::Disconnected(_) => TorchScriptError::Failed("the module's thread has ended".into()),
        })?;
        result.await.map_err(|_| TorchScriptError::Failed("the module's thread has ended".into()))?
    }
}

/// Loads a module on a new thread.
fn start(name: &str, path: &Path, device: Device) -> Result<SyncSender<Call>, TorchScriptError> {
    let failed = |what: String| TorchScriptError::Load { path: path.into(), what };
    let mut module = CModule::load_on_device(path, device).map_err(|e| failed(first_line(&e.to_string())))?;
    module.set_eval();
    let (calls, calls_rx) = sync_channel::<Call>(QUEUE);
    std::thread::Builder::new()
        .name(format!("script-{name}"))
        .spawn(move || {
            let _no_grad = tch::no_grad_guard();
            while let Ok((arguments, reply)) = calls_rx.recv() {
                if !reply.is_closed() {
                    let _ = reply.send(run(&module, arguments, device));
                }
            }
        })
        .map_err(|e| failed(e.to_string()))?;
    Ok(calls)
}

fn run(module: &CModule, arguments: Vec<Argument>, device: Device) -> Result<Vec<Tensor>, TorchScriptError> {
    let values: Vec<IValue> = arguments
        .into_iter()
        .map(|a| match a {
            Argument::Tensor(t) => IValue::Tensor(t.to_device(device)),
            Argument::Int(v) => IValue::Int(v),
            Argument::Float(v) => IValue::Double(v),
            Argument::Bool(v) => IValue::Bool(v),
        })
        .collect();
    let result =
        module.forward_is(&values).map_err(|e| TorchScriptError::Failed(error_line(&e.to_string())))?;
    let mut tensors = Vec::new();
    flatten(result, &mut tensors)?;
    Ok(tensors)
}

fn flatten(value: IValue, out: &mut Vec<Tensor>) -> Result<(), TorchScriptError> {
    match value {
        IValue::Tensor(t) => out.push(t.to_device(Device::Cpu).contiguous()),
        IValue::Tuple(list) | IValue::GenericList(list) => {
            for value in list {
                flatten(value, out)?;
            }
        }
        IValue::TensorList(list) => {
            out.extend(list.into_iter().map(|t| t.to_device(Device::Cpu).contiguous()))
        }
        IValue::Int(v) => out.push(Tensor::from_slice(&[v])),
        IValue::Double(v) => out.push(Tensor::from_slice(&[v])),
        IValue::Bool(v) => out.push(Tensor::from_slice(&[v])),
        other => {
            return Err(TorchScriptError::Failed(format!(
                "the module returned {other:?}, which is not a tensor"
            )));
        }
    }
    Ok(())
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Returns the error message at the end of a TorchScript traceback.
fn error_line(text: &str) -> String {
    let mut lines = text.lines().filter(|l| !l.trim().is_empty() && !l.contains("frame #"));
    lines.rfind(|l| l.contains("Error")).or(text.lines().next()).unwrap_or_default().to_owned()
}
