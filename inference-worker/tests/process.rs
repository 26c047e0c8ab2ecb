//! Tests of the binary with a tiny model: flags, drain, exit status, TLS. They need no download.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::{
    io::{BufRead, BufReader, Read},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use inference_worker::testing::TinyModel;
use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct Process {
    child: Child,
    address: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_inference-worker"));
    command.arg("--model").arg(format!("tiny={}", directory.display())).args([
        "--kv-cache-mib",
        "4",
        "--threads",
        "1",
    ]);
    command.args(["--listen", "127.0.0.1:0"]).env("RUST_LOG", "inference_worker=info").env("NO_COLOR", "1");
    command.stderr(Stdio::piped());
    command
}

/// Starts the worker, and waits for the log line with its address.
fn start(mut command: Command) -> Process {
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address = loop {
        let line = lines.next().expect("the worker ended early").unwrap();
        if let Some((_, rest)) = line.split_once("address=") {
            break rest.split_whitespace().next().unwrap().to_owned();
        }
    };
    std::thread::spawn(move || lines.for_each(drop));
    Process { child, address }
}

async fn wait_ready(client: &reqwest::Client, url: &str) {
    for _ in 0..600 {
        if client.get(format!("{url}/ready")).send().await.is_ok_and(|r| r.status() == 200) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not ready after 30 seconds");
}

fn terminate(process: &Process) {
    // SAFETY: a signal to a child of this test, which has not been waited for.
    unsafe { libc::kill(process.child.id() as i32, libc::SIGTERM) };
}

#[tokio::test]
async fn sigterm_completes_requests_in_flight_and_then_ends_the_process() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel { context: 100_000, ..TinyModel::default() }.write(directory.path());
    let mut command = command(directory.path());
    command.args(["--drain-grace", "1"]);
    let mut process = start(command);
    let url = format!("http://{}", process.address);
    let client = reqwest::Client::new();
    wait_ready(&client, &url).await;
    let body = json!({"prompt": "a", "max_tokens": 3000, "ignore_eos": true, "stream": true}).to_string();
    let stream = client.post(format!("{url}/v1/completions")).body(body).send().await.unwrap();
    let mut stream = stream.bytes_stream();
    stream.next().await.unwrap().unwrap();
    terminate(&process);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let ready = client.get(format!("{url}/ready")).send().await.unwrap();
    assert_eq!(ready.status(), 503);
    let state: Json = client.get(format!("{url}/replica")).send().await.unwrap().json().await.unwrap();
    assert_eq!(state["phase"], "draining");
    let late = client
        .post(format!("{url}/v1/completions"))
        .body(r#"{"prompt":"b","max_tokens":1}"#)
        .send()
        .await
        .unwrap();
    assert_eq!((late.status().as_u16(), late.headers()["connection"].to_str().unwrap()), (200, "close"));
    let mut all = Vec::new();
    while let Some(chunk) = stream.next().await {
        all.extend(chunk.expect("the stream is complete"));
    }
    assert!(String::from_utf8_lossy(&all).trim_end().ends_with("data: [DONE]"));
    let status = tokio::task::spawn_blocking(move || process.child.wait().unwrap()).await.unwrap();
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_drain_ends_at_its_deadline() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel { context: 100_000, ..TinyModel::default() }.write(directory.path());
    let mut command = command(directory.path());
    command.args(["--drain-grace", "0", "--drain-deadline", "1"]);
    let mut process = start(command);
    let url = format!("http://{}", process.address);
    let client = reqwest::Client::new();
    wait_ready(&client, &url).await;
    let body = json!({"prompt": "a", "max_tokens": 15000, "ignore_eos": true, "stream": true}).to_string();
    let stream = client.post(format!("{url}/v1/completions")).body(body).send().await.unwrap();
    let began = Instant::now();
    terminate(&process);
    let status = tokio::task::spawn_blocking(move || process.child.wait().unwrap()).await.unwrap();
    assert!(status.success() && began.elapsed() < Duration::from_secs(20), "{status} {:?}", began.elapsed());
    drop(stream);
}

#[test]
fn a_model_that_cannot_be_loaded_ends_the_process_with_the_reason() {
    let mut child = command(Path::new("/nonexistent")).spawn().unwrap();
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(log.contains("no model at /nonexistent"), "{log}");
    let usage =
        Command::new(env!("CARGO_BIN_EXE_inference-worker")).args(["--device", "tpu"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&usage.stderr).contains("cuda:N"));
}

#[tokio::test]
async fn tls_uses_the_given_certificate_and_rejects_plain_http() {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let made = rcgen::generate_simple_self_signed(vec!["worker.test".to_owned()]).unwrap();
    let (cert, key) = (directory.path().join("cert.pem"), directory.path().join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let mut command = command(directory.path());
    command.arg("--tls-cert").arg(&cert).arg("--tls-key").arg(&key);
    let process = start(command);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&cert).unwrap()).unwrap();
    let config =
        rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let socket = tokio::net::TcpStream::connect(&process.address).await.unwrap();
    let mut tls = connector.connect(ServerName::try_from("worker.test").unwrap(), socket).await.unwrap();
    tls.write_all(b"GET /health HTTP/1.1\r\nhost: worker.test\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let _ = tls.read_to_end(&mut answer).await;
    assert!(
        String::from_utf8_lossy(&answer).starts_with("HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    // Plain HTTP is rejected.
    assert!(reqwest::get(format!("http://{}/health", process.address)).await.is_err());
}
