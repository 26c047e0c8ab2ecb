//! Metrics for Prometheus, read from the maps, the snapshot and the registries at each scrape.
//!
//! Names are `lb_<subsystem>_<what>_<unit>[_total]`, labels service, backend, reason; never a client's
//! address. Served over HTTP at `/metrics`. Called by the daemon and by `lbd worker`.

mod encoder;
mod families;

use crate::serve::api::Control;
use axum::{
    Router,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use encoder::{Encoder, reason_sample};
use families::Scrape;
use lb_common::Reason;
use prometheus_client::{encoding::DescriptorEncoder, registry::Registry};
use std::{fmt, future::Future, net::SocketAddr, sync::Arc};
use tokio::net::TcpListener;

/// Why metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot serve metrics on {address}: {source}; choose another --metrics ADDRESS:PORT, or --metrics off"
)]
pub struct MetricsError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

/// Listens for scrapes. If the address was not `required`, failing to bind it is only a warning.
///
/// # Errors
/// The address is `required` and cannot be bound.
pub async fn bind(address: Option<SocketAddr>, required: bool) -> Result<Option<TcpListener>, MetricsError> {
    let Some(address) = address else { return Ok(None) };
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Some(listener)),
        Err(source) if required => Err(MetricsError { address, source }),
        Err(error) => {
            tracing::warn!(%address, %error, "cannot listen for scrapes: metrics are not served");
            Ok(None)
        }
    }
}

/// Serves a daemon's metrics until `stop` resolves.
///
/// # Errors
/// Accepting failed for good.
pub async fn serve(
    listener: TcpListener,
    control: Arc<Control>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    serve_text(listener, stop, move || text(&control)).await
}

/// Serves the text that `text` returns, at `/metrics`.
///
/// # Errors
/// Accepting failed for good.
pub async fn serve_text(
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send + 'static,
    text: impl Fn() -> Result<String, String> + Clone + Send + Sync + 'static,
) -> std::io::Result<()> {
    let scrape = move || {
        let text = text.clone();
        async move {
            match tokio::task::spawn_blocking(text).await {
                Ok(Ok(text)) => page(text),
                Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            }
        }
    };
    let router = Router::new()
        .route("/metrics", get(scrape))
        .fallback(|| async { (StatusCode::NOT_FOUND, "metrics are at /metrics\n") });
    axum::serve(listener, router).with_graceful_shutdown(stop).await
}

fn page(text: String) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// All metrics of a daemon as text.
///
/// # Errors
/// The maps cannot be read.
pub fn text(control: &Arc<Control>) -> Result<String, String> {
    let counters = control.engine().counters().map_err(|e| e.to_string())?;
    encode(Scrape { control: control.clone(), counters })
}

/// A worker's metrics as text.
///
/// # Errors
/// The text cannot be encoded, which does not happen.
pub fn worker_text(reasons: &[(Reason, u64)]) -> Result<String, String> {
    #[derive(Debug)]
    struct WorkerCollector(Vec<(Reason, u64)>);
    impl prometheus_client::collector::Collector for WorkerCollector {
        fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
            let mut out = Encoder(encoder);
            out.counters(
                "lb_worker_packets",
                "Packets on this worker, by what happened to them",
                self.0.iter().map(reason_sample),
            )
        }
    }
    encode(WorkerCollector(reasons.to_vec()))
}

fn encode(collector: impl prometheus_client::collector::Collector) -> Result<String, String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(collector));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).map_err(|e| e.to_string())?;
    Ok(text)
}
