//! TLS, HTTPS and gRPC probes against servers on the loopback interface: certificates made for the test, and the
//! gRPC project's own health service.

use super::{Outcome, ProbeStep, ProbeTarget, probe::probe};
use crate::desired::model::{HealthCheck, HealthKind};
use rcgen::{CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::{
    RootCertStore, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
};
use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tonic_health::{ServingStatus, server::health_reporter};

/// A CA, a server's certificate for `worker.example` and a client's, as files.
struct Files {
    directory: tempfile::TempDir,
}

impl Files {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
        write("ca.pem", ca.pem());
        for name in ["worker.example", "client"] {
            let key = KeyPair::generate().unwrap();
            let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
            write(&format!("{name}.pem"), params.signed_by(&key, &ca).unwrap().pem());
            write(&format!("{name}.key"), key.serialize_pem());
        }
        Self { directory }
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    fn acceptor(&self, client: bool, protocols: &[&[u8]]) -> tokio_rustls::TlsAcceptor {
        let read = |name: &str| CertificateDer::from_pem_file(Path::new(&self.path(name))).unwrap();
        let key = PrivateKeyDer::from_pem_file(Path::new(&self.path("worker.example.key"))).unwrap();
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if client {
            let mut roots = RootCertStore::empty();
            roots.add(read("ca.pem")).unwrap();
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_single_cert(vec![read("worker.example.pem")], key).unwrap();
        config.alpn_protocols = protocols.iter().map(|p| p.to_vec()).collect();
        Arc::new(config).into()
    }
}

async fn ask(address: SocketAddr, check: &str) -> Result<String, String> {
    let check: HealthCheck = serde_json::from_str(check).unwrap();
    let kind: HealthKind = check.kind;
    let timeout = Duration::from_secs(3);
    let target = ProbeTarget { address, vip: [10, 0, 0, 1].into(), kind, timeout, through: None };
    match probe(Arc::default(), target, None).await {
        ProbeStep::Done(Outcome::Passed(what)) => Ok(what),
        ProbeStep::Done(Outcome::Failed(what)) => Err(what),
        ProbeStep::Done(Outcome::NotProbed(obstacle)) => Err(format!("not probed: {obstacle}")),
        ProbeStep::Late(_) => Err("late".to_owned()),
    }
}

/// Serves one answer over TLS to each client; the request is appended to the answer, for tests to inspect.
async fn https(acceptor: tokio_rustls::TlsAcceptor) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut request = vec![0; 4_096];
                let n = stream.read(&mut request).await.unwrap_or(0);
                let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nmodel loaded\n";
                let _ = stream.write_all(head.as_bytes()).await;
                let _ = stream.write_all(&request[..n]).await;
                let _ = stream.shutdown().await;
            });
        }
    });
    address
}

#[tokio::test]
async fn tls_is_verified_by_name_and_issuer_unless_told_otherwise() {
    let files = Files::new();
    let address = https(files.acceptor(false, &[b"http/1.1"])).await;
    let ca = files.path("ca.pem");
    let key = files.path("worker.example.key");
    for (check, expected) in [
        (format!(r#"{{"kind":"tls","sni":"worker.example","ca":"{ca}"}}"#), Ok("TLSv1_3 handshake done")),
        (format!(r#"{{"kind":"tls","sni":"other.example","ca":"{ca}"}}"#), Err("not valid for name")),
        (format!(r#"{{"kind":"tls","ca":"{ca}"}}"#), Err("not valid for name")),
        (r#"{"kind":"tls","verify":false}"#.to_owned(), Ok("TLSv1_3 handshake done")),
        (
            r#"{"kind":"tls","sni":"worker.example","ca":"/nowhere.pem"}"#.to_owned(),
            Err("not probed: TLS: /nowhere.pem: "),
        ),
        (format!(r#"{{"kind":"tls","ca":"{key}"}}"#), Err("not probed: TLS: ")),
        (
            format!(r#"{{"kind":"tls","sni":"a b","ca":"{ca}"}}"#),
            Err("not probed: TLS: \"a b\" is not a valid server name: set sni"),
        ),
        (
            format!(r#"{{"kind":"https","host":"worker.example","ca":"{ca}","body":"model loaded"}}"#),
            Ok("status 200"),
        ),
        (
            format!(
                r#"{{"kind":"https","host":"worker.example","ca":"{ca}","headers":{{"x-probe":"7"}},"body":"x-probe: 7"}}"#
            ),
            Ok("status 200"),
        ),
        (
            format!(r#"{{"kind":"https","host":"worker.example","ca":"{ca}","body":"model missing"}}"#),
            Err("the body does not contain \"model missing\": \"model loaded"),
        ),
        (
            format!(r#"{{"kind":"https","host":"worker.example","ca":"{ca}","status":[500,599]}}"#),
            Err("status 200, expected 500 to 599"),
        ),
    ] {
        let result = ask(address, &check).await;
        match (&result, expected) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{check}"),
            (Err(got), Err(want)) => assert!(got.contains(want), "{check}: {got} is not {want}"),
            _ => panic!("{check}: {result:?} is not {expected:?}"),
        }
    }
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = plain.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = plain.accept().await.unwrap();
        let _ = stream.write_all(b"SSH-2.0-OpenSSH_9.2\r\n").await;
    });
    let error = ask(address, r#"{"kind":"tls","verify":false}"#).await.unwrap_err();
    assert!(error.starts_with("TLS: "), "{error}");
}

#[tokio::test]
async fn a_client_certificate_is_shown_where_one_is_given() {
    let files = Files::new();
    let address = https(files.acceptor(true, &[])).await;
    let (ca, cert, key) = (files.path("ca.pem"), files.path("client.pem"), files.path("client.key"));
    let with = format!(
        r#"{{"kind":"https","host":"worker.example","ca":"{ca}","client_cert":"{cert}","client_key":"{key}"}}"#
    );
    assert_eq!(ask(address, &with).await, Ok("status 200".into()));
    let without = format!(r#"{{"kind":"https","host":"worker.example","ca":"{ca}"}}"#);
    assert!(ask(address, &without).await.is_err());
}

#[tokio::test]
async fn grpc_health_is_asked_as_its_own_project_serves_it() {
    let (reporter, service) = health_reporter();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
    reporter.set_service_status("chat.v1.Chat", ServingStatus::NotServing).await;
    assert_eq!(ask(address, r#"{"kind":"grpc"}"#).await, Ok("SERVING".into()));
    let chat = r#"{"kind":"grpc","service":"chat.v1.Chat"}"#;
    assert_eq!(ask(address, chat).await, Err("NOT_SERVING".into()));
    reporter.set_service_status("chat.v1.Chat", ServingStatus::Serving).await;
    assert_eq!(ask(address, chat).await, Ok("SERVING".into()));
    let other = ask(address, r#"{"kind":"grpc","service":"nobody"}"#).await;
    assert_eq!(other, Err("gRPC: service \"nobody\" is unknown (NOT_FOUND)".into()));

    // A gRPC server without the health service, and a server of another protocol.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let empty = tonic::service::Routes::default();
    tokio::spawn(tonic::transport::Server::builder().add_routes(empty).serve_with_incoming(incoming));
    assert_eq!(
        ask(address, r#"{"kind":"grpc"}"#).await,
        Err("gRPC: the server has no health service (UNIMPLEMENTED)".into())
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
    });
    let error = ask(address, r#"{"kind":"grpc"}"#).await.unwrap_err();
    assert!(error.starts_with("the answer is not HTTP/2"), "{error}");
}
