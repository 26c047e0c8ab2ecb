//! `lbctl backend`.

use super::{Context, Exit, Failure, WriteFlags, lists::ListFlags, words::variant};
use crate::{
    desired::model::{BackendState, Name, NameError, QuicError, ServerId},
    lbctl::render::backend as render,
    serve::api::types::BackendInfo,
};
use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Map, Value, json};
use std::net::IpAddr;

/// Subcommands of `lbctl backend`.
#[derive(Debug, Subcommand)]
pub enum BackendCommand {
    /// Add a backend to a service
    #[command(after_help = "Example: lbctl backend add web w1 10.1.0.1 --weight 2")]
    Add(AddBackend),
    /// List the backends of one service or of all services
    #[command(visible_alias = "ls")]
    List {
        /// Name of the service
        service: Option<Name>,
        #[command(flatten)]
        list: ListFlags,
    },
    /// Show one backend with its health history
    Show {
        /// Name of the service
        service: Name,
        /// Name of the backend
        name: Name,
    },
    /// Change settings of a backend; settings not given keep their values
    Set(SetBackend),
    /// Stop sending new flows to a backend; established flows continue
    Drain(OneBackend),
    /// Send new flows to a drained backend again
    Undrain(OneBackend),
    /// Remove a backend; its established flows continue for the drain time
    #[command(visible_alias = "remove")]
    Rm(OneBackend),
}

/// Arguments of `add`.
#[derive(Debug, Args)]
pub struct AddBackend {
    /// Name of the service
    service: Name,
    /// Name of the backend, unique within the service
    name: Name,
    /// Address of the worker
    address: IpAddr,
    /// With mode nat: port that the worker listens on [default: the service's]
    #[arg(long)]
    port: Option<u16>,
    /// Weight: share of new flows, relative to the other backends
    #[arg(long, value_name = "N", default_value_t = 1)]
    weight: u32,
    /// Administrative state: up, draining or down
    #[arg(long, value_parser = variant::<BackendState>(), default_value = "up")]
    state: BackendState,
    /// QUIC-LB server ID that the worker encodes in its connection IDs
    #[arg(long, value_name = "HEX")]
    server_id: Option<ServerId>,
    /// Region of the backend [default: the region of each lbd host]
    #[arg(long, value_name = "REGION")]
    region: Option<Name>,
    /// Zone of the backend within its region [default: the zone of each lbd host]
    #[arg(long, value_name = "ZONE")]
    zone: Option<Name>,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `set`.
#[derive(Debug, Args)]
pub struct SetBackend {
    /// Name of the service
    service: Name,
    /// Name of the backend
    name: Name,
    /// Address of the worker
    #[arg(long)]
    address: Option<IpAddr>,
    /// With mode nat: port that the worker listens on
    #[arg(long)]
    port: Option<u16>,
    /// Weight: share of new flows, relative to the other backends
    #[arg(long, value_name = "N")]
    weight: Option<u32>,
    /// Administrative state: up, draining or down
    #[arg(long, value_parser = variant::<BackendState>())]
    state: Option<BackendState>,
    /// QUIC-LB server ID that the worker encodes in its connection IDs, or none
    #[arg(long, value_name = "HEX|none", value_parser = server_id)]
    server_id: Option<OptionalId>,
    /// Region of the backend, or none
    #[arg(long, value_name = "REGION|none", value_parser = optional_name)]
    region: Option<OptionalName>,
    /// Zone of the backend within its region, or none
    #[arg(long, value_name = "ZONE|none", value_parser = optional_name)]
    zone: Option<OptionalName>,
    #[command(flatten)]
    write: WriteFlags,
}

/// Arguments of `drain`, `undrain` and `rm`.
#[derive(Debug, Args)]
pub struct OneBackend {
    /// Name of the service
    service: Name,
    /// Name of the backend
    name: Name,
    #[command(flatten)]
    write: WriteFlags,
}

/// A server ID, or `none`.
#[derive(Clone, Debug)]
pub struct OptionalId(Option<ServerId>);

fn server_id(text: &str) -> Result<OptionalId, String> {
    if text == "none" {
        return Ok(OptionalId(None));
    }
    text.parse().map(|id| OptionalId(Some(id))).map_err(|e: QuicError| e.to_string())
}

/// The name of a region or zone, or `none`.
#[derive(Clone, Debug)]
pub struct OptionalName(Option<Name>);

fn optional_name(text: &str) -> Result<OptionalName, String> {
    if text == "none" {
        return Ok(OptionalName(None));
    }
    text.parse().map(|name| OptionalName(Some(name))).map_err(|e: NameError| e.to_string())
}

fn path(service: &Name, name: &Name) -> String {
    format!("/v1/services/{service}/backends/{name}")
}

/// Runs a subcommand.
pub async fn run(context: &mut Context<'_>, command: BackendCommand) -> Result<Exit, Failure> {
    match command {
        BackendCommand::Add(args) => add(context, args).await,
        BackendCommand::Set(args) => set(context, args).await,
        BackendCommand::Drain(one) => change(context, one, Method::POST, "/drain", "drains").await,
        BackendCommand::Undrain(one) => {
            change(context, one, Method::POST, "/undrain", "takes new flows again").await
        }
        BackendCommand::Rm(one) => change(context, one, Method::DELETE, "", "removed").await,
        BackendCommand::List { service, list: flags } => {
            context.list(&flags, async |context| list(context, service.as_ref()).await).await
        }
        BackendCommand::Show { service, name } => {
            let backend: BackendInfo = context.client.get(&path(&service, &name), &()).await?;
            if context.out.json {
                context.out.json(&backend, false)?;
            } else {
                render::backend(&mut context.out, &backend)?;
            }
            Ok(Exit::Ok)
        }
    }
}

async fn add(context: &mut Context<'_>, args: AddBackend) -> Result<Exit, Failure> {
    let AddBackend { service, name, address, port, weight, state, server_id, region, zone, write } = args;
    let mut body = json!({ "address": address, "weight": weight, "state": state });
    if let Some(id) = server_id {
        body["server_id"] = json!(id);
    }
    if let Some(port) = port {
        body["port"] = json!(port);
    }
    for (key, place) in [("region", region), ("zone", zone)] {
        if let Some(place) = place {
            body[key] = json!(place);
        }
    }
    let what = format!("backend {service}/{name} added");
    context.write(&what, Method::POST, &path(&service, &name), &write.query(), Some(&body)).await
}

async fn set(context: &mut Context<'_>, args: SetBackend) -> Result<Exit, Failure> {
    let SetBackend { service, name, address, port, weight, state, server_id, region, zone, write } = args;
    let mut body = Map::new();
    let mut set = |key: &str, value: Option<Value>| value.map(|v| body.insert(key.to_owned(), v));
    set("address", address.map(|a| json!(a)));
    set("port", port.map(|p| json!(p)));
    set("weight", weight.map(|w| json!(w)));
    set("state", state.map(|s| json!(s)));
    set("server_id", server_id.map(|id| json!(id.0)));
    set("region", region.map(|place| json!(place.0)));
    set("zone", zone.map(|place| json!(place.0)));
    if body.is_empty() {
        let what =
            "nothing to set: give --weight, --address, --port, --state, --server-id, --region or --zone"
                .to_owned();
        return Err(Failure::Usage { what });
    }
    let what = format!("backend {service}/{name} set");
    context.write(&what, Method::PATCH, &path(&service, &name), &write.query(), Some(&body)).await
}

async fn list(context: &mut Context<'_>, service: Option<&Name>) -> Result<Exit, Failure> {
    let path = match service {
        Some(service) => format!("/v1/services/{service}/backends"),
        None => "/v1/backends".to_owned(),
    };
    let backends: Vec<BackendInfo> = context.client.get(&path, &()).await?;
    if context.out.json {
        context.out.json(&backends, false)?;
    } else if backends.is_empty() {
        say!("no backends: add one with `lbctl backend add`");
    } else {
        render::backends(&mut context.out, &backends)?;
    }
    Ok(Exit::Ok)
}

async fn change(
    context: &mut Context<'_>,
    one: OneBackend,
    method: Method,
    tail: &str,
    what: &str,
) -> Result<Exit, Failure> {
    let OneBackend { service, name, write } = one;
    let what = format!("backend {service}/{name} {what}");
    let path = format!("{}{tail}", path(&service, &name));
    context.write(&what, method, &path, &write.query(), None::<&()>).await
}
