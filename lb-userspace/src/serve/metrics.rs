//! Metrics for Prometheus, read from the maps, the snapshot and the registries at each scrape.
//!
//! Names are `lb_<subsystem>_<what>_<unit>[_total]`, labels service, backend, reason; never a client's
//! address. Served over HTTP at `/metrics`. Called by the daemon and by `lbd worker`.

mod encoder;
mod families;

use crate::serve::{
    api::Control,
    connections::{self, Accepted, Door, Limits},
};
use axum::{
    Router,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use encoder::{Encoder, reason_sample};
use families::Scrape;
use lb_common::Reason;
use prometheus_client::{encoding::DescriptorEncoder, registry::Registry};
use std::{
    fmt,
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::net::{TcpListener, TcpStream};

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

/// A scraper opens one connection, and keeps it from scrape to scrape or not. No client can keep others out.
const LIMITS: Limits = Limits { all: 128, reserved: 0, per_client: 32, idle: Duration::from_secs(60) };

/// A listener for scrapers, told apart by address.
struct MetricsSocket(TcpListener);

impl Door for MetricsSocket {
    type Stream = TcpStream;
    type Client = IpAddr;

    async fn accept(&self) -> std::io::Result<Accepted<TcpStream, IpAddr>> {
        let (stream, client) = self.0.accept().await?;
        Ok(Accepted { stream, client: client.ip(), is_privileged: false })
    }
}

/// Serves a daemon's metrics until `stop` resolves.
pub async fn serve(listener: TcpListener, control: Arc<Control>, stop: impl Future<Output = ()> + Send) {
    serve_text(listener, stop, move || text(&control)).await;
}

/// Serves the text that `text` returns, at `/metrics`.
pub async fn serve_text(
    listener: TcpListener,
    stop: impl Future<Output = ()> + Send,
    text: impl Fn() -> Result<String, String> + Clone + Send + Sync + 'static,
) {
    let scrape = move |headers: HeaderMap| {
        let text = text.clone();
        async move {
            match tokio::task::spawn_blocking(text).await {
                Ok(Ok(text)) => page(text, accepts_openmetrics(&headers)),
                Ok(Err(error)) => (StatusCode::INTERNAL_SERVER_ERROR, error).into_response(),
                Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            }
        }
    };
    let router = Router::new()
        .route("/metrics", get(scrape))
        .fallback(|| async { (StatusCode::NOT_FOUND, "metrics are at /metrics\n") });
    let route = move |_: &TcpStream| router.clone();
    let refusal = "{\"error\":\"too many connections to the metrics listener\"}\n".to_owned();
    connections::serve(("metrics", LIMITS), MetricsSocket(listener), route, refusal, stop).await;
}

/// Whether the client asks for OpenMetrics, as Prometheus does; others get the older text format.
fn accepts_openmetrics(headers: &HeaderMap) -> bool {
    let mut all = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    all.any(|value| value.contains("application/openmetrics-text"))
}

fn page(text: String, is_openmetrics: bool) -> Response {
    let (kind, text) = if is_openmetrics {
        ("application/openmetrics-text; version=1.0.0; charset=utf-8", text)
    } else {
        ("text/plain; version=0.0.4; charset=utf-8", prometheus_text(&text))
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// Turns OpenMetrics into the text format 0.0.4: there, a counter's metadata has the name of its samples, and there is
/// no mark of the end. The families have no units and no exemplars.
fn prometheus_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let lines: Vec<&str> = text.lines().filter(|line| *line != "# EOF").collect();
    for (i, line) in lines.iter().enumerate() {
        let words: Vec<&str> = line.splitn(4, ' ').collect();
        let is_counter = |words: &[&str], name: &str| words.starts_with(&["#", "TYPE", name, "counter"]);
        match words[..] {
            ["#", what @ ("HELP" | "TYPE"), name, rest] => {
                // The help stands before the type.
                let next =
                    lines.get(i + 1).map(|line| line.split(' ').collect::<Vec<_>>()).unwrap_or_default();
                let total = if is_counter(&words, name) || is_counter(&next, name) { "_total" } else { "" };
                out.push_str(&format!("# {what} {name}{total} {rest}\n"));
            }
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_format_names_counters_as_their_samples() {
        let open = worker_text(&[(Reason::Truncated, 3)]).expect("it is encoded");
        assert!(open.contains("# TYPE lb_worker_packets counter\n") && open.ends_with("# EOF\n"), "{open}");
        let old = prometheus_text(&open);
        assert!(old.contains("# HELP lb_worker_packets_total Packets"), "{old}");
        assert!(old.contains("# TYPE lb_worker_packets_total counter\n"), "{old}");
        assert!(!old.contains("EOF"), "{old}");
        let samples = |text: &str| -> Vec<String> {
            text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect()
        };
        assert_eq!(samples(&old), samples(&open));
        let gauge =
            "# HELP a Of a.\n# TYPE a gauge\na 1\n# HELP b Of b.\n# TYPE b counter\nb_total 1\n# EOF\n";
        let expected =
            "# HELP a Of a.\n# TYPE a gauge\na 1\n# HELP b_total Of b.\n# TYPE b_total counter\nb_total 1\n";
        assert_eq!(prometheus_text(gauge), expected);
    }

    #[test]
    fn the_format_is_the_one_that_is_asked_for() {
        let accepts = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::ACCEPT, text.parse().expect("a header"));
            accepts_openmetrics(&headers)
        };
        assert!(accepts("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4"));
        assert!(!accepts("text/plain") && !accepts("*/*") && !accepts_openmetrics(&HeaderMap::new()));
    }
}
