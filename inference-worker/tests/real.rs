//! Tests of the API with the real model: OpenAI's Python client, curl, TorchScript, and mixed load. They need the
//! model and the Python environment that `cargo xtask test inference` sets up.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::{
    path::PathBuf,
    process::{Command, Output},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use inference_worker::testing::{TestWorker, WorkerOptions, cache_dir, model_file};
use serde_json::{Value as Json, json};

/// Returns `LB_TEST_PYTHON`, else the Python of the environment that `cargo xtask test inference` sets up.
fn python() -> PathBuf {
    let path = std::env::var_os("LB_TEST_PYTHON")
        .map_or_else(|| cache_dir().join("python-test/bin/python"), PathBuf::from);
    assert!(path.exists(), "{} is missing: run `cargo xtask test inference`", path.display());
    path
}

/// The tests run one by one, because one of them measures the memory of the process.
static LOCK: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn worker(options: WorkerOptions) -> (TestWorker, tokio::sync::MutexGuard<'static, ()>) {
    let guard = LOCK.lock().await;
    // Small enough that mixed load uses all blocks early and causes preemptions.
    (
        TestWorker::start(&[("smol", &model_file())], WorkerOptions { kv_bytes: 64 << 20, ..options }).await,
        guard,
    )
}

async fn run(mut command: Command) -> Output {
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openais_python_client_works() {
    let (worker, _guard) = worker(WorkerOptions::default()).await;
    let mut command = Command::new(python());
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/openai_client.py")).arg(&worker.url);
    let output = run(command).await;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("all checks passed"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_receives_a_stream() {
    let (worker, _guard) = worker(WorkerOptions::default()).await;
    let body = json!({"model": "smol", "messages": [{"role": "user", "content": "What is gravity? Answer in one sentence."}],
                      "temperature": 0, "max_tokens": 8, "stream": true});
    let mut command = Command::new("curl");
    command.args(["-sSN", "--fail", "-H", "content-type: application/json", "-d", &body.to_string()]);
    command.arg(format!("{}/v1/chat/completions", worker.url));
    let output = run(command).await;
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    let events = text.lines().filter_map(|l| serde_json::from_str::<Json>(l.strip_prefix("data: ")?).ok());
    let text_of_stream: String =
        events.filter_map(|e| Some(e["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect();
    assert!(text_of_stream.starts_with("Gravity is"), "{text_of_stream}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_torchscript_module_works_with_the_open_inference_protocol() {
    let find = "import importlib.util as u, os; print(os.path.join(os.path.dirname(u.find_spec('silero_vad').origin), 'data', 'silero_vad.jit'))";
    let found = Command::new(python()).args(["-c", find]).output().unwrap();
    let file = PathBuf::from(String::from_utf8(found.stdout).unwrap().trim());
    let (worker, _guard) =
        worker(WorkerOptions { torchscript: vec![("vad".into(), file)], ..WorkerOptions::default() }).await;
    let client = reqwest::Client::new();
    let infer = async |sound: Vec<f32>, rate: i64| {
        let body = json!({"id": "7", "inputs": [
            {"name": "x", "shape": [1, 512], "datatype": "FP32", "data": sound},
            {"name": "sr", "shape": [1], "datatype": "INT64", "data": [rate], "parameters": {"scalar": true}}]});
        client
            .post(format!("{}/v2/models/vad/infer", worker.url))
            .body(body.to_string())
            .send()
            .await
            .unwrap()
    };
    let silence: Json = infer(vec![0.0; 512], 16000).await.json().await.unwrap();
    let output = &silence["outputs"][0];
    assert_eq!(
        (&silence["model_name"], &silence["id"], &output["datatype"]),
        (&json!("vad"), &json!("7"), &json!("FP32"))
    );
    let speech = output["data"][0].as_f64().unwrap();
    assert!((0.0..0.2).contains(&speech), "silence was classified as speech: {silence}");
    let wrong = infer(vec![0.0; 512], 12345).await;
    assert_eq!(wrong.status(), 400, "the module rejects this rate");
    let short = client.post(format!("{}/v2/models/vad/infer", worker.url)).body(
        json!({"inputs": [{"name": "x", "shape": [2, 512], "datatype": "FP32", "data": [1.0]}]}).to_string(),
    );
    assert_eq!(short.send().await.unwrap().status(), 400);
    let ready = client.get(format!("{}/v2/models/vad/ready", worker.url)).send().await.unwrap();
    assert_eq!(ready.status(), 200);
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

/// A request that takes longer is stuck, even on a busy machine.
const STUCK_AFTER: Duration = Duration::from_secs(300);

/// Runs for `LB_SOAK_SECONDS` (default 120). No request may get stuck, all KV blocks must be freed, and memory must
/// not grow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mixed_load_leaks_neither_blocks_nor_memory() {
    let seconds = std::env::var("LB_SOAK_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(120);
    let (worker, _guard) = worker(WorkerOptions::default()).await;
    let client = reqwest::Client::new();
    let (done, cancelled) = (AtomicU64::new(0), AtomicU64::new(0));
    let end = Instant::now() + Duration::from_secs(seconds);
    let one = async |lane: u64| {
        let mut i = 0u64;
        while Instant::now() < end {
            i += 1;
            let mix = lane * 7919 + i * 104_729;
            let prompt = format!("Number {} is ", mix % 50).repeat(1 + (mix % 12) as usize);
            let (path, body) = match mix % 5 {
                0 => ("/v1/embeddings", json!({"input": prompt})),
                1 => (
                    "/v1/chat/completions",
                    json!({"messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "stream": true}),
                ),
                _ => (
                    "/v1/completions",
                    json!({"prompt": prompt, "max_tokens": 1 + mix % 24, "temperature": (mix % 3) as f64 / 2.0, "n": 1 + mix % 2}),
                ),
            };
            let request = client.post(format!("{}{path}", worker.url)).body(body.to_string()).send();
            let timeout = if mix.is_multiple_of(4) { Duration::from_millis(mix % 300) } else { STUCK_AFTER };
            let answer = tokio::time::timeout(timeout, async {
                request.await.unwrap().error_for_status().unwrap().bytes().await.unwrap()
            })
            .await;
            match answer {
                Ok(_) => done.fetch_add(1, Relaxed),
                Err(_) => {
                    assert!(timeout < STUCK_AFTER, "a request is stuck: {path} {body}");
                    cancelled.fetch_add(1, Relaxed)
                }
            };
        }
    };
    let watch = async {
        // Growth in the first half (buffers, cache pages, arenas) is not a leak.
        tokio::time::sleep(Duration::from_secs(seconds) / 2).await;
        let middle = resident_bytes();
        tokio::time::sleep(Duration::from_secs(seconds) / 2).await;
        (middle, resident_bytes())
    };
    let lanes = futures_util::future::join_all((0..10).map(one));
    let (_, (middle, last)) = tokio::join!(lanes, watch);
    worker.wait_until_idle("smol").await;
    let (done, cancelled) = (done.load(Relaxed), cancelled.load(Relaxed));
    println!("{done} requests done, {cancelled} cancelled, {middle} bytes half-way, {last} bytes at the end");
    assert!(done > 0 && cancelled > 0);
    assert!(last < middle + (48 << 20), "memory grew from {middle} to {last} bytes");
}
