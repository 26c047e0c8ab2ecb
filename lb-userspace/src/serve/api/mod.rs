//! HTTP+JSON on a Unix socket: how `lbctl` and other clients read and change the balancer's state.
//!
//! Input: requests of local processes, identified by their peer credentials. Output: JSON of [`types`]; errors
//! as `{"error": {code, message, fix?, details?}}`. A write returns once the maps are written.
//! [`Control`] does the work, on top of a [`Store`](crate::desired::store::Store) and an [`Engine`].
//! Called by the daemon; `lbctl::client` is the client.

mod access;
pub mod control;
mod drains;
pub mod engine;
pub mod error;
pub mod events;
mod find;
pub mod guard;
pub mod host;
mod listener;
pub mod locks;
pub mod members;
pub mod memory;
mod peer;
mod problems;
pub mod region_drain;
pub mod regions;
pub mod rollouts;
mod routes;
pub mod store;
mod table;
pub mod types;
mod view;

pub use access::{Author, LOCK_TOKEN};
pub use control::Control;
pub use engine::{Engine, EngineError};
pub use error::ApiError;
pub use events::EventLog;
pub use listener::{SocketError, bind};
pub use peer::Peer;
pub use routes::router;
pub use view::fate_label;

use super::connections;
use axum::{Extension, extract::ConnectInfo};
use listener::ApiSocket;
use std::{future::Future, sync::Arc};
use tokio::net::{UnixListener, UnixStream};

/// Serves the API on a bound socket until `stop` resolves; requests in progress are finished.
pub async fn serve(
    listener: UnixListener,
    control: Arc<Control>,
    writers: peer::Writers,
    stop: impl Future<Output = ()> + Send,
) {
    let busy = ApiError::busy("too many connections to lbd's socket")
        .fix("close those that are not needed; root always gets in");
    let router = router(control);
    let of_peers = writers.clone();
    let route =
        move |stream: &UnixStream| router.clone().layer(Extension(ConnectInfo(Peer::of(stream, &of_peers))));
    let door = ApiSocket { listener, writers };
    connections::serve(("API", listener::LIMITS), door, route, busy.into_json(), stop).await;
}

pub use peer::Writers;

#[cfg(test)]
mod access_tests;
#[cfg(test)]
mod force_tests;
#[cfg(test)]
mod rollout_tests;
#[cfg(test)]
mod tests;
