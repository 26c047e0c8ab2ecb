//! Accepting connections: plain or TLS, bounded in number, with time limits against clients that dawdle.
//!
//! On drain, idle connections are closed and busy ones after their response.

use std::{
    convert::Infallible,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use anyhow::Context;
use axum::Router;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::{App, Phase, guard::Peer};

/// How long a client may take for a request's header, or keep a connection idle.
const HEADER_TIME: Duration = Duration::from_secs(75);
/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);
/// How long a new connection's first request may be on its way when draining begins.
const FIRST_REQUEST_TIME: Duration = Duration::from_secs(1);
/// Connections at once.
const MAX_CONNECTIONS: usize = 8192;

/// Reads certificate chain and key (PEM) into an acceptor.
pub fn tls(certificates: &Path, key: &Path) -> anyhow::Result<TlsAcceptor> {
    let chain = CertificateDer::pem_file_iter(certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("reading certificates from {}", certificates.display()))?;
    anyhow::ensure!(!chain.is_empty(), "{} holds no certificate", certificates.display());
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("reading the key from {}", key.display()))?;
    let mut config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .context("certificate and key do not go together")?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Serves until the app drains and `finished` resolves; then ends what is left.
pub async fn run(
    app: Arc<App>,
    router: Router,
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    finished: impl Future<Output = ()>,
) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut tasks = JoinSet::new();
    tokio::pin!(finished);
    loop {
        while tasks.try_join_next().is_some() {}
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    tasks.spawn(connection(app.clone(), router.clone(), stream, peer, tls.clone(), permit));
                }
                Err(error) => {
                    // Out of file descriptors, most likely: others will be closed soon.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            () = &mut finished => break,
        }
    }
    tasks.shutdown().await;
}

async fn connection(
    app: Arc<App>,
    router: Router,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<TlsAcceptor>,
    _permit: OwnedSemaphorePermit,
) {
    let _ = stream.set_nodelay(true);
    match tls {
        None => http(app, router, stream, peer).await,
        Some(acceptor) => match tokio::time::timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => http(app, router, stream, peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake took too long"),
        },
    }
}

async fn http(
    app: Arc<App>,
    router: Router,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
) {
    let seen = Arc::new(AtomicBool::new(false));
    let service_seen = seen.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        service_seen.store(true, Relaxed);
        request.extensions_mut().insert(Peer(peer));
        let router = router.clone();
        async move { Ok::<_, Infallible>(router.oneshot(request).await.unwrap_or_else(|never| match never {})) }
    });
    let mut phase = app.phase.subscribe();
    let late = *phase.borrow() == Phase::Draining;
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        // A connection that comes while draining is served once: to refuse it would fail its request.
        .keep_alive(!late)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let draining = async move {
        if late {
            return std::future::pending().await;
        }
        // The guard that `wait_for` gives is gone before the next await.
        drop(phase.wait_for(|p| *p == Phase::Draining).await);
        // Shutting down closes an idle connection at once; one that is new has a request on its way.
        if !seen.load(Relaxed) {
            tokio::time::sleep(FIRST_REQUEST_TIME).await;
        }
    };
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = draining => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%peer, %error, "connection ended");
    }
}
