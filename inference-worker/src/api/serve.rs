//! Accepts connections, with or without TLS, with limits of their number and of the time that clients may take.
//!
//! On drain, idle connections are closed immediately, and others after their response.

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

use super::{App, Phase, middleware::PeerAddress};

/// How long a client may take to send the headers of a request, or leave a connection idle.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
/// How long a client may take for the TLS handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long to wait for the first request of a new connection when a drain begins.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// Maximum number of connections.
const MAX_CONNECTIONS: usize = 8192;

/// Creates a TLS acceptor from a certificate chain and a key (PEM files).
pub fn tls(certificates: &Path, key: &Path) -> anyhow::Result<TlsAcceptor> {
    let chain = CertificateDer::pem_file_iter(certificates)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(|| format!("cannot read certificates from {}", certificates.display()))?;
    anyhow::ensure!(!chain.is_empty(), "{} contains no certificate (PEM)", certificates.display());
    let key = PrivateKeyDer::from_pem_file(key)
        .with_context(|| format!("cannot read the private key from {}", key.display()))?;
    let mut config =
        rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .context("the private key does not belong to the certificate")?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Accepts connections until `finished` resolves, then closes the remaining ones.
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
                    // Probably too many open files, which other connections will close soon.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
            () = &mut finished => break,
        }
    }
    tasks.shutdown().await;
}

/// Serves a connection, after the TLS handshake if there is one.
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
        Some(acceptor) => match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => http(app, router, stream, peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS handshake failed"),
            Err(_) => tracing::debug!(%peer, "TLS handshake timed out"),
        },
    }
}

/// Serves the requests of a connection.
async fn http(
    app: Arc<App>,
    router: Router,
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    peer: SocketAddr,
) {
    let had_request = Arc::new(AtomicBool::new(false));
    let service_had_request = had_request.clone();
    let service = service_fn(move |mut request: hyper::Request<Incoming>| {
        service_had_request.store(true, Relaxed);
        request.extensions_mut().insert(PeerAddress(peer));
        let router = router.clone();
        async move { Ok::<_, Infallible>(router.oneshot(request).await.unwrap_or_else(|never| match never {})) }
    });
    let mut phase = app.phase.subscribe();
    let opened_while_draining = *phase.borrow() == Phase::Draining;
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        // A connection that is opened during a drain gets one response, because closing it would fail its request.
        .keep_alive(!opened_while_draining)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let draining = async move {
        if opened_while_draining {
            return std::future::pending().await;
        }
        // Drops the guard that `wait_for` returns before the next await.
        drop(phase.wait_for(|p| *p == Phase::Draining).await);
        // A graceful shutdown closes an idle connection immediately, but the first request may be about to arrive.
        if !had_request.load(Relaxed) {
            tokio::time::sleep(FIRST_REQUEST_TIMEOUT).await;
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
