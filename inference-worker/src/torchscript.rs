//! TorchScript modules, each on a thread of its own.
//!
//! Input: a `.pt`/`.jit` file and named arguments. Output: the module's results as tensors. Called by the
//! Open Inference Protocol endpoints.

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

/// Calls that may wait for a module.
const QUEUE: usize = 64;

/// An argument or result.
pub enum Argument {
    /// A tensor.
    Tensor(Tensor),
    /// A whole number that the module takes as such.
    Int(i64),
    /// A float that the module takes as such.
    Float(f64),
    /// A truth value that the module takes as such.
    Bool(bool),
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// Not there.
    #[error("module `{0}` is not loaded")]
    Unknown(String),
    /// Too many calls wait.
    #[error("{QUEUE} calls already wait for this module")]
    Full,
    /// The module refused its arguments, or failed.
    #[error("{0}")]
    Failed(String),
    /// It could not be loaded.
    #[error("cannot load TorchScript module {}: {what}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What libtorch said.
        what: String,
    },
}

type Reply = oneshot::Sender<Result<Vec<Tensor>, ScriptError>>;
type Call = (Vec<Argument>, Reply);

/// The loaded modules by name.
#[derive(Debug, Default, Clone)]
pub struct Scripts {
    modules: Arc<BTreeMap<String, SyncSender<Call>>>,
}

impl Scripts {
    /// Loads modules; each one's thread calls it alone, as a module may keep state between calls.
    pub fn load(files: &[(String, PathBuf)], device: Device) -> Result<Self, ScriptError> {
        let mut modules = BTreeMap::new();
        for (name, path) in files {
            modules.insert(name.clone(), start(name, path, device)?);
        }
        Ok(Self { modules: Arc::new(modules) })
    }

    /// Whether a module is there.
    pub fn has(&self, name: &str) -> bool {
        self.modules.contains_key(name)
    }

    /// Names of all modules.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        self.modules.keys()
    }

    /// Calls a module's `forward`.
    pub async fn call(&self, name: &str, arguments: Vec<Argument>) -> Result<Vec<Tensor>, ScriptError> {
        let module = self.modules.get(name).ok_or_else(|| ScriptError::Unknown(name.into()))?;
        let (reply, answer) = oneshot::channel();
        module.try_send((arguments, reply)).map_err(|e| match e {
            TrySendError::Full(_) => ScriptError::Full,
            TrySendError::Disconnected(_) => ScriptError::Failed("the module's thread has ended".into()),
        })?;
        answer.await.map_err(|_| ScriptError::Failed("the module's thread has ended".into()))?
    }
}

fn start(name: &str, path: &Path, device: Device) -> Result<SyncSender<Call>, ScriptError> {
    let failed = |what: String| ScriptError::Load { path: path.into(), what };
    let mut module = CModule::load_on_device(path, device).map_err(|e| failed(first_line(&e.to_string())))?;
    module.set_eval();
    let (calls, inbox) = sync_channel::<Call>(QUEUE);
    std::thread::Builder::new()
        .name(format!("script-{name}"))
        .spawn(move || {
            let _no_grad = tch::no_grad_guard();
            while let Ok((arguments, reply)) = inbox.recv() {
                if !reply.is_closed() {
                    let _ = reply.send(run(&module, arguments, device));
                }
            }
        })
        .map_err(|e| failed(e.to_string()))?;
    Ok(calls)
}

fn run(module: &CModule, arguments: Vec<Argument>, device: Device) -> Result<Vec<Tensor>, ScriptError> {
    let values: Vec<IValue> = arguments
        .into_iter()
        .map(|a| match a {
            Argument::Tensor(t) => IValue::Tensor(t.to_device(device)),
            Argument::Int(v) => IValue::Int(v),
            Argument::Float(v) => IValue::Double(v),
            Argument::Bool(v) => IValue::Bool(v),
        })
        .collect();
    let result = module.forward_is(&values).map_err(|e| ScriptError::Failed(last_line(&e.to_string())))?;
    let mut tensors = Vec::new();
    flatten(result, &mut tensors)?;
    Ok(tensors)
}

fn flatten(value: IValue, out: &mut Vec<Tensor>) -> Result<(), ScriptError> {
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
            return Err(ScriptError::Failed(format!("the module returned {other:?}, which is no tensor")));
        }
    }
    Ok(())
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Of a TorchScript traceback, the error itself.
fn last_line(text: &str) -> String {
    let mut lines = text.lines().filter(|l| !l.trim().is_empty() && !l.contains("frame #"));
    lines.rfind(|l| l.contains("Error")).or(text.lines().next()).unwrap_or_default().to_owned()
}
