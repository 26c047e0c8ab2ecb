//! Open Inference Protocol v2 (KServe, Triton): server and model metadata, and inference with TorchScript modules.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json as JsonBody,
    extract::{Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use serde_json::{Value as Json, json};
use tch::{Kind, Tensor};

use super::{App, error::ApiError, extract::Body};
use crate::torchscript::{Argument, TorchScriptError};

/// Handles `GET /v2`.
pub async fn server() -> JsonBody<Json> {
    JsonBody(json!({"name": "inference-worker", "version": env!("CARGO_PKG_VERSION"), "extensions": []}))
}

type PathParams = Path<HashMap<String, String>>;

/// Returns name, platform and versions of the model in the path, or an error with status 404.
fn find(app: &App, path: &PathParams) -> Result<(String, &'static str, Vec<String>), ApiError> {
    let name = path.get("name").cloned().unwrap_or_default();
    let version = path.get("version");
    if app.torchscript.has(&name) && version.is_none_or(|v| v == "1") {
        return Ok((name, "pytorch_torchscript", vec!["1".into()]));
    }
    let full = version.map_or_else(|| name.clone(), |v| format!("{name}@{v}"));
    match app.registry.models().get(Some(&full)) {
        Some(engine) => Ok((name, "lb_llama", vec![engine.version.clone()])),
        None => Err(ApiError::unknown_model(&full)),
    }
}

/// Handles `GET /v2/models/{name}`.
pub async fn metadata(State(app): State<Arc<App>>, path: PathParams) -> Result<JsonBody<Json>, ApiError> {
    let (name, platform, versions) = find(&app, &path)?;
    // TorchScript has neither names nor shapes of arguments; arguments are passed by position.
    Ok(JsonBody(
        json!({"name": name, "versions": versions, "platform": platform, "inputs": [], "outputs": []}),
    ))
}

/// Handles `GET /v2/models/{name}/ready`.
pub async fn ready(State(app): State<Arc<App>>, path: PathParams) -> Result<Response, ApiError> {
    let (name, ..) = find(&app, &path)?;
    Ok((StatusCode::OK, JsonBody(json!({"name": name, "ready": true}))).into_response())
}

/// Body of an inference request.
#[derive(Debug, Deserialize)]
pub struct InferRequest {
    id: Option<String>,
    inputs: Vec<InferInput>,
}

/// An input tensor.
#[derive(Debug, Deserialize)]
struct InferInput {
    name: String,
    shape: Vec<i64>,
    datatype: String,
    data: Json,
    #[serde(default)]
    parameters: HashMap<String, Json>,
}

/// Maximum number of elements of an input.
const MAX_ELEMENTS: i64 = 1 << 26;

/// Adds the values of nested lists to `out`, in order.
fn flatten<'a>(data: &'a Json, out: &mut Vec<&'a Json>) {
    match data {
        Json::Array(list) => list.iter().for_each(|v| flatten(v, out)),
        value => out.push(value),
    }
}

/// Converts an input to an argument of a module.
fn argument(input: &InferInput) -> Result<Argument, ApiError> {
    let invalid = |what: String| ApiError::param("inputs", format!("input `{}`: {what}.", input.name));
    let mut values = Vec::new();
    flatten(&input.data, &mut values);
    let elements =
        input.shape.iter().try_fold(1i64, |n, d| n.checked_mul(*d).filter(|n| *d >= 0 && *n <= MAX_ELEMENTS));
    if elements != Some(values.len() as i64) {
        return Err(invalid(format!("shape {:?} does not match {} values", input.shape, values.len())));
    }
    let not_a = |v: &Json| invalid(format!("{v} is not a valid {}", input.datatype));
    let floats = || values.iter().map(|v| v.as_f64().ok_or_else(|| not_a(v))).collect::<Result<Vec<_>, _>>();
    let ints = || values.iter().map(|v| v.as_i64().ok_or_else(|| not_a(v))).collect::<Result<Vec<_>, _>>();
    let bools = || values.iter().map(|v| v.as_bool().ok_or_else(|| not_a(v))).collect::<Result<Vec<_>, _>>();
    let (kind, tensor) = match input.datatype.as_str() {
        "FP64" => (Kind::Double, Tensor::from_slice(&floats()?)),
        "FP32" => (Kind::Float, Tensor::from_slice(&floats()?)),
        "FP16" => (Kind::Half, Tensor::from_slice(&floats()?)),
        "BF16" => (Kind::BFloat16, Tensor::from_slice(&floats()?)),
        "INT64" => (Kind::Int64, Tensor::from_slice(&ints()?)),
        "INT32" => (Kind::Int, Tensor::from_slice(&ints()?)),
        "INT16" => (Kind::Int16, Tensor::from_slice(&ints()?)),
        "INT8" => (Kind::Int8, Tensor::from_slice(&ints()?)),
        "UINT8" => (Kind::Uint8, Tensor::from_slice(&ints()?)),
        "BOOL" => (Kind::Bool, Tensor::from_slice(&bools()?)),
        other => return Err(invalid(format!("datatype `{other}` is not supported"))),
    };
    if input.parameters.get("scalar") == Some(&Json::Bool(true)) && values.len() == 1 {
        return Ok(match kind {
            Kind::Bool => Argument::Bool(bools()?[0]),
            Kind::Double | Kind::Float | Kind::Half | Kind::BFloat16 => Argument::Float(floats()?[0]),
            _ => Argument::Int(ints()?[0]),
        });
    }
    Ok(Argument::Tensor(tensor.to_kind(kind).view(input.shape.as_slice())))
}

/// Returns the description and data of a result.
fn output(index: usize, tensor: &Tensor) -> Result<Json, ApiError> {
    let kind = tensor.kind();
    let (datatype, data) = match kind {
        Kind::Bool => ("BOOL", json!(Vec::<bool>::try_from(tensor.view([-1])).map_err(internal)?)),
        Kind::Double => ("FP64", json!(Vec::<f64>::try_from(tensor.view([-1])).map_err(internal)?)),
        Kind::Float | Kind::Half | Kind::BFloat16 => {
            ("FP32", json!(Vec::<f32>::try_from(tensor.to_kind(Kind::Float).view([-1])).map_err(internal)?))
        }
        _ => {
            ("INT64", json!(Vec::<i64>::try_from(tensor.to_kind(Kind::Int64).view([-1])).map_err(internal)?))
        }
    };
    Ok(json!({"name": format!("output_{index}"), "shape": tensor.size(), "datatype": datatype, "data": data}))
}

fn internal(error: tch::TchError) -> ApiError {
    ApiError::internal(error.to_string())
}

/// Handles `POST /v2/models/{name}/infer`. An input with `parameters: {"scalar": true}` is passed as a number.
pub async fn infer(
    State(app): State<Arc<App>>,
    path: PathParams,
    Body(request): Body<InferRequest>,
) -> Result<JsonBody<Json>, ApiError> {
    let (name, platform, versions) = find(&app, &path)?;
    if platform != "pytorch_torchscript" {
        return Err(ApiError::bad_request(format!(
            "`{name}` is a language model; use /v1/chat/completions or /v1/completions."
        )));
    }
    let arguments = request.inputs.iter().map(argument).collect::<Result<Vec<_>, _>>()?;
    let tensors = app.torchscript.call(&name, arguments).await.map_err(|e| match e {
        TorchScriptError::Full => ApiError {
            retry_after: Some(1),
            ..ApiError::status(StatusCode::TOO_MANY_REQUESTS, format!("Overloaded: {e}; retry later."))
        },
        TorchScriptError::Failed(_) => ApiError::bad_request(format!("`{name}` failed: {e}")),
        other => ApiError::internal(other.to_string()),
    })?;
    let outputs = tensors.iter().enumerate().map(|(i, t)| output(i, t)).collect::<Result<Vec<_>, _>>()?;
    Ok(JsonBody(
        json!({"model_name": name, "model_version": versions[0], "id": request.id, "outputs": outputs}),
    ))
}
