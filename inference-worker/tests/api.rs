//! Tests of the HTTP API with a tiny random model: responses, errors, limits, drain. They need no download.

#![allow(clippy::unwrap_used, reason = "a test fails where it panics")]

use std::{
    path::Path,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use inference_worker::{
    api::Settings,
    engine::EngineOptions,
    testing::{TestWorker, TinyModel, WorkerOptions},
};
use reqwest::{Client, Response};
use serde_json::{Value as Json, json};

/// A worker, a client, and the directory of the model.
struct Fixture {
    worker: TestWorker,
    client: Client,
    directory: tempfile::TempDir,
}

async fn fixture_with(options: WorkerOptions) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::default().write(directory.path());
    let worker = TestWorker::start(&[("tiny", directory.path())], options).await;
    Fixture { worker, client: Client::new(), directory }
}

async fn fixture() -> Fixture {
    fixture_with(WorkerOptions::default()).await
}

impl Fixture {
    async fn post(&self, path: &str, body: Json) -> Response {
        self.client.post(format!("{}{path}", self.worker.url)).body(body.to_string()).send().await.unwrap()
    }

    async fn ok(&self, path: &str, body: Json) -> Json {
        let response = self.post(path, body).await;
        let status = response.status();
        let text = response.text().await.unwrap();
        assert_eq!(status, 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    async fn get(&self, path: &str) -> Response {
        self.client.get(format!("{}{path}", self.worker.url)).send().await.unwrap()
    }

    /// Returns the status, and the error object in OpenAI's format.
    async fn error(&self, path: &str, body: &str) -> (u16, Json) {
        let response = self
            .client
            .post(format!("{}{path}", self.worker.url))
            .body(body.to_owned())
            .send()
            .await
            .unwrap();
        let status = response.status().as_u16();
        let text = response.text().await.unwrap();
        let json: Json = serde_json::from_str(&text).unwrap_or_else(|_| panic!("{status}: {text}"));
        assert!(json["error"]["message"].is_string() && json["error"]["type"].is_string(), "{json}");
        (status, json["error"].clone())
    }
}

/// Parses the events of a stream that ends with `[DONE]`.
fn events(text: &str) -> Vec<Json> {
    let data: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    let (done, chunks) = data.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    chunks.iter().map(|c| serde_json::from_str(c).unwrap()).collect()
}

#[tokio::test]
async fn streamed_and_other_responses_have_equal_text_and_usage() {
    let fixture = fixture().await;
    let mut body =
        json!({"model": "tiny", "prompt": "Hello", "max_tokens": 20, "temperature": 0, "ignore_eos": true});
    let whole = fixture.ok("/v1/completions", body.clone()).await;
    assert_eq!(
        whole["usage"],
        json!({"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25,
                                      "prompt_tokens_details": {"cached_tokens": 0}})
    );
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let response = fixture.post("/v1/completions", body).await;
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let chunks = events(&response.text().await.unwrap());
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap());
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 20);

    let mut body = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 9,
                          "temperature": 0, "ignore_eos": true});
    let whole = fixture.ok("/v1/chat/completions", body.clone()).await;
    assert_eq!(whole["object"], "chat.completion");
    body["stream"] = true.into();
    let chunks = events(&fixture.post("/v1/chat/completions", body).await.text().await.unwrap());
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap());
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn n_seed_logprobs_echo_and_stop_work() {
    let fixture = fixture().await;
    let body = json!({"prompt": ["ab", "cd"], "n": 2, "max_tokens": 6, "seed": 3, "ignore_eos": true, "logprobs": 2, "echo": true});
    let first = fixture.ok("/v1/completions", body.clone()).await;
    let again = fixture.ok("/v1/completions", body).await;
    assert_eq!(first["choices"], again["choices"], "equal seeds give equal choices");
    let choices = first["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    assert_ne!(choices[0]["text"], choices[1]["text"], "choices differ");
    assert!(choices[2]["text"].as_str().unwrap().starts_with("cd"));
    let l = &choices[0]["logprobs"];
    assert_eq!(l["tokens"].as_array().unwrap().len(), 8);
    assert!(l["token_logprobs"][0].is_null() && l["token_logprobs"][1].as_f64().unwrap() < 0.0);
    assert_eq!(l["text_offset"], json!([0, 1, 2, 3, 4, 5, 6, 7]));

    // Characters 3 and 4 of the greedy output become the stop string of the second request.
    let greedy = json!({"prompt": "stop", "max_tokens": 12, "temperature": 0, "ignore_eos": true});
    let text = fixture.ok("/v1/completions", greedy.clone()).await["choices"][0]["text"]
        .as_str()
        .unwrap()
        .to_owned();
    let stop: String = text.chars().skip(3).take(2).collect();
    let mut stopped = greedy.clone();
    stopped["stop"] = json!([stop]);
    let answer = fixture.ok("/v1/completions", stopped).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let kept = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with(kept) && !kept.contains(&stop), "{text:?} cut to {kept:?} at {stop:?}");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 12);

    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": true, "top_logprobs": 4, "ignore_eos": true});
    let answer = fixture.ok("/v1/chat/completions", chat).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!((content.len(), content[0]["top_logprobs"].as_array().unwrap().len()), (3, 4));
}

#[tokio::test]
async fn bad_input_is_rejected_with_a_message_that_names_it() {
    let fixture = fixture().await;
    let chat = "/v1/chat/completions";
    let text = "/v1/completions";
    for (path, body, status, expected) in [
        (text, "{", 400, "JSON"),
        (text, "[]", 400, "JSON"),
        (text, r#"{"model":"tiny"}"#, 400, "prompt"),
        (text, r#"{"prompt":5}"#, 400, "prompt"),
        (text, r#"{"prompt":""}"#, 400, "empty"),
        (text, r#"{"prompt":[]}"#, 400, "prompt"),
        (text, r#"{"prompt":[1,99999]}"#, 400, "99999"),
        (text, r#"{"prompt":[-1]}"#, 400, "prompt"),
        (text, r#"{"model":"gpt-9","prompt":"a"}"#, 404, "gpt-9"),
        (text, r#"{"prompt":"a","max_tokens":0}"#, 400, "max_tokens"),
        (text, r#"{"prompt":"a","max_tokens":-5}"#, 400, "max_tokens"),
        (text, r#"{"prompt":"a","max_tokens":512}"#, 400, "maximum context length is 512"),
        (text, r#"{"prompt":"a","max_tokens":9223372036854775807}"#, 400, "maximum context length is 512"),
        (text, r#"{"prompt":"a","max_tokens":"ten"}"#, 400, "`max_tokens` is not valid"),
        (text, r#"{"prompt":"a","max_tokens":1,"max_tokens":2}"#, 400, "duplicate field `max_tokens`"),
        (text, r#"{"prompt":"a","stop":7}"#, 400, "`stop` is not valid: expected a string or"),
        (text, r#"{"prompt":"a","seed":1.5}"#, 400, "`seed`"),
        (chat, r#"{"messages":"hello"}"#, 400, "`messages` is not valid"),
        (text, r#"{"prompt":"a","temperature":9}"#, 400, "temperature"),
        (text, r#"{"prompt":"a","top_p":0}"#, 400, "top_p"),
        (text, r#"{"prompt":"a","top_k":-7}"#, 400, "top_k"),
        (text, r#"{"prompt":"a","n":0}"#, 400, "`n`"),
        (text, r#"{"prompt":"a","n":100000}"#, 400, "`n`"),
        (text, r#"{"prompt":"a","stop":[""]}"#, 400, "stop"),
        (text, r#"{"prompt":"a","logprobs":1000}"#, 400, "logprobs"),
        (text, r#"{"prompt":"a","logit_bias":{"x":1}}"#, 400, "logit_bias"),
        (text, r#"{"prompt":"a","suffix":"b"}"#, 400, "suffix"),
        (text, r#"{"prompt":"a","min_tokens":99}"#, 400, "min_tokens"),
        (chat, r#"{"messages":[]}"#, 400, "messages"),
        (chat, r#"{"messages":[{"content":"a"}]}"#, 400, "role"),
        (chat, r#"{"messages":[{"role":"user"}]}"#, 400, "content"),
        (chat, r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, 400, "not text"),
        (chat, r#"{"messages":["hi"]}"#, 400, "object"),
        (chat, r#"{"messages":[{"role":"user","content":"a"}],"top_logprobs":3}"#, 400, "logprobs"),
        (
            chat,
            r#"{"messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_object"}}"#,
            400,
            "response_format",
        ),
        ("/v1/embeddings", r#"{"input":"a","dimensions":7}"#, 400, "64 dimensions"),
        ("/tokenize", r#"{}"#, 400, "prompt"),
        ("/detokenize", r#"{"tokens":[999]}"#, 400, "999"),
        ("/v1/nothing", r#"{}"#, 404, "/v1/nothing"),
        ("/health", r#"{}"#, 405, "POST"),
        ("/v2/models/none/infer", r#"{"inputs":[]}"#, 404, "none"),
    ] {
        let (got, error) = fixture.error(path, body).await;
        let message = error["message"].as_str().unwrap();
        assert!(got == status && message.contains(expected), "{path} {body}: {got} {message}");
    }
    let long = json!({"prompt": "x".repeat(600)}).to_string();
    let (status, error) = fixture.error(text, &long).await;
    assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")));
    assert!(error["message"].as_str().unwrap().contains("512"));
    let (status, _) = fixture.error(text, &json!({"prompt": "x".repeat(9 << 20)}).to_string()).await;
    assert_eq!(status, 413);
    let bad = fixture
        .client
        .post(format!("{}{text}", fixture.worker.url))
        .body(vec![b'"', 0xFF, 0xFE, b'"'])
        .send()
        .await
        .unwrap();
    assert_eq!(bad.status(), 400);
    assert!(bad.text().await.unwrap().contains("UTF-8"));
    fixture.worker.wait_until_idle("tiny").await;
    fixture.ok(text, json!({"prompt": "still here", "max_tokens": 2})).await;
}

#[tokio::test]
async fn unknown_fields_are_ignored_and_request_ids_returned() {
    let fixture = fixture().await;
    fixture
        .ok(
            "/v1/completions",
            json!({"prompt": "a", "max_tokens": 1, "bootstrap_room": 7, "cache_salt": "x"}),
        )
        .await;
    let with_id = |id: &'static str| {
        fixture.client.get(format!("{}/v1/models", fixture.worker.url)).header("x-request-id", id).send()
    };
    assert_eq!(with_id("abc-1").await.unwrap().headers()["x-request-id"], "abc-1");
    assert_eq!(with_id("a b\"").await.unwrap().headers()["x-request-id"].len(), 32);
    let load = fixture
        .client
        .get(format!("{}/v1/models", fixture.worker.url))
        .header("endpoint-load-metrics-format", "text")
        .send()
        .await
        .unwrap();
    assert!(
        load.headers()["endpoint-load-metrics"]
            .to_str()
            .unwrap()
            .starts_with("TEXT named_metrics.kv_cache_usage_perc=")
    );
}

#[tokio::test]
async fn embeddings_have_unit_length_and_do_not_depend_on_batch_or_chunks() {
    let options = EngineOptions { prompt_tokens_per_step: Some(32), ..EngineOptions::default() };
    let fixture = fixture_with(WorkerOptions { engine: options, ..WorkerOptions::default() }).await;
    let long = "the quick brown fox ".repeat(8);
    let both = fixture.ok("/v1/embeddings", json!({"model": "tiny", "input": ["hello", long]})).await;
    let alone = fixture.ok("/v1/embeddings", json!({"input": long})).await;
    let vector = |j: &Json| -> Vec<f64> {
        j["embedding"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
    };
    let (a, b) = (vector(&both["data"][1]), vector(&alone["data"][0]));
    assert_eq!(a.len(), 64);
    assert!((a.iter().map(|v| v * v).sum::<f64>() - 1.0).abs() < 1e-5);
    assert!(a.iter().zip(&b).all(|(x, y)| (x - y).abs() < 1e-5));
    assert_ne!(a, vector(&both["data"][0]));
    assert_eq!(both["usage"]["prompt_tokens"], 5 + 160);
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let fixture = fixture().await;
    let t = fixture.ok("/tokenize", json!({"prompt": "hé"})).await;
    assert_eq!(t["tokens"], json!([104, 195, 169]));
    assert_eq!(fixture.ok("/detokenize", json!({"tokens": t["tokens"]})).await["prompt"], "hé");
    let chat = fixture.ok("/tokenize", json!({"messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!(chat["tokens"][0], 256, "the template's special token is one token");
}

#[tokio::test]
async fn health_metrics_and_replica_report_the_state() {
    let fixture = fixture().await;
    for path in [
        "/health",
        "/ready",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2",
        "/v2/models/tiny",
        "/get_load",
        "/get_model_info",
        "/version",
    ] {
        assert_eq!(fixture.get(path).await.status(), 200, "{path}");
    }
    fixture.ok("/v1/completions", json!({"prompt": "a", "max_tokens": 4, "ignore_eos": true})).await;
    fixture.worker.wait_until_idle("tiny").await;
    let metrics = fixture.get("/metrics").await.text().await.unwrap();
    for line in [
        "vllm:num_requests_running{model_name=\"tiny\"} 0",
        "vllm:num_requests_waiting{model_name=\"tiny\"} 0",
        "vllm:kv_cache_usage_perc{model_name=\"tiny\"} 0.0",
        "vllm:generation_tokens_total{model_name=\"tiny\"} 4",
        "vllm:request_success_total{model_name=\"tiny\",finished_reason=\"length\"} 1",
        "vllm:time_to_first_token_seconds_count{model_name=\"tiny\"} 1",
        "vllm:time_per_output_token_seconds_count{model_name=\"tiny\"} 3",
        "vllm:e2e_request_latency_seconds_count{model_name=\"tiny\"} 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let state: Json = fixture.get("/replica").await.json().await.unwrap();
    assert_eq!(
        (&state["phase"], &state["model"], &state["running"]),
        (&json!("ready"), &json!("tiny"), &json!(0))
    );
    assert_eq!(state["protocol"], 1);
    assert!(state["time_ms"].as_u64().is_some_and(|ms| ms > 1_600_000_000_000), "{state}");
    let stream = fixture
        .client
        .get(format!("{}/replica", fixture.worker.url))
        .header("accept", "text/event-stream")
        .send()
        .await
        .unwrap();
    let mut stream = stream.bytes_stream();
    for _ in 0..2 {
        let event =
            tokio::time::timeout(Duration::from_secs(3), stream.next()).await.unwrap().unwrap().unwrap();
        assert!(String::from_utf8_lossy(&event).starts_with("event: replica\ndata: {"));
    }
    // A drain is reported immediately, before the next heartbeat.
    fixture.worker.app.phase.send_replace(inference_worker::api::Phase::Draining);
    let draining_since = Instant::now();
    loop {
        let event =
            tokio::time::timeout(Duration::from_secs(3), stream.next()).await.unwrap().unwrap().unwrap();
        if String::from_utf8_lossy(&event).contains("\"phase\":\"draining\"") {
            break;
        }
    }
    assert!(draining_since.elapsed() < Duration::from_millis(500), "{:?}", draining_since.elapsed());
}

#[tokio::test]
async fn api_keys_and_the_admin_key_give_access_to_their_paths_only() {
    let settings = Settings {
        api_keys: vec!["k1".into(), "k2".into()],
        admin_key: Some("boss".into()),
        name: Some("gpu-1".parse().unwrap()),
        ..Settings::default()
    };
    let fixture = fixture_with(WorkerOptions { settings, ..WorkerOptions::default() }).await;
    let call = |path: &str, key: &str| {
        fixture.client.get(format!("{}{path}", fixture.worker.url)).bearer_auth(key.to_owned()).send()
    };
    let refused = fixture.get("/v1/models").await;
    assert_eq!(refused.status(), 401);
    assert_eq!(refused.headers()["x-worker"], "gpu-1");
    assert_eq!(call("/v1/models", "k").await.unwrap().status(), 401);
    assert_eq!(call("/v1/models", "k2").await.unwrap().status(), 200);
    assert_eq!(call("/admin/models", "k1").await.unwrap().status(), 403);
    assert_eq!(call("/admin/models", "boss").await.unwrap().status(), 200);
    assert_eq!(fixture.get("/health").await.status(), 200, "probes need no key");
}

#[tokio::test]
async fn a_full_queue_is_answered_with_429_and_connection_close() {
    let engine = EngineOptions { max_running: 1, max_queue: 1, ..EngineOptions::default() };
    let fixture = fixture_with(WorkerOptions { engine, ..WorkerOptions::default() }).await;
    let body = json!({"prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": true});
    let (one, two) = (
        fixture.post("/v1/completions", body.clone()).await,
        fixture.post("/v1/completions", body.clone()).await,
    );
    assert_eq!((one.status().as_u16(), two.status().as_u16()), (200, 200));
    let third = fixture.post("/v1/completions", body).await;
    assert_eq!(third.status(), 429);
    assert_eq!(third.headers()["retry-after"], "1");
    assert_eq!(third.headers()["connection"], "close");
    let error: Json = third.json().await.unwrap();
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    drop((one, two));
    fixture.worker.wait_until_idle("tiny").await;
    fixture.ok("/v1/completions", json!({"prompt": "a", "max_tokens": 1})).await;
}

#[tokio::test]
async fn a_request_is_cancelled_when_its_client_disconnects() {
    let fixture = fixture().await;
    let engine = fixture.worker.engine("tiny");
    for stream in [true, false] {
        let body =
            json!({"prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": stream}).to_string();
        let request = fixture.client.post(format!("{}/v1/completions", fixture.worker.url)).body(body);
        let client = tokio::spawn(async move { request.send().await.unwrap().text().await });
        while engine.stats.running.load(Relaxed) == 0 {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        client.abort();
        fixture.worker.wait_until_idle("tiny").await;
    }
    let metrics = fixture.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("finished_reason=\"abort\"} 2"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_cancelled_requests_free_all_blocks() {
    use inference_worker::engine::{Event, GenerationParams, Request, Task};
    let fixture = fixture_with(WorkerOptions { kv_bytes: 1 << 20, ..WorkerOptions::default() }).await;
    let engine = fixture.worker.engine("tiny");
    let mut sent = 0u32;
    while sent < 10_000 {
        let mut receivers = Vec::new();
        for i in 0..50u32 {
            let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
            let prompt: Vec<u32> = (0..(1 + (sent + i) % 90)).map(|t| (t * 7 + i % 3) % 256).collect();
            let generate =
                GenerationParams { max_tokens: 100, ignore_eos: true, ..GenerationParams::default() };
            let task = if i % 10 == 9 { Task::Embed } else { Task::Generate(Box::new(generate)) };
            let request = Request {
                prompt,
                task,
                events,
                arrived: std::time::Instant::now(),
                group: engine.new_group(),
            };
            engine.submit(vec![request]).unwrap();
            receivers.push(receiver);
        }
        sent += 50;
        // Requests are cancelled while they wait, during prefill, and while they generate.
        if sent.is_multiple_of(200) {
            let first = receivers[0].recv().await;
            assert!(matches!(first, Some(Event::Token { .. })));
        }
        drop(receivers);
        while engine.stats.in_flight.load(Relaxed) > 50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    fixture.worker.wait_until_idle("tiny").await;
    assert_eq!(engine.stats.in_flight_tokens.load(Relaxed), 0);
    // All blocks are available: a request that needs the whole cache runs.
    let kv = engine.kv_tokens();
    let body = json!({"prompt": vec![65; kv.min(512) - 10], "max_tokens": 5, "ignore_eos": true});
    fixture.ok("/v1/completions", body).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preempted_requests_finish_with_the_text_that_they_have_alone() {
    let fixture = fixture_with(WorkerOptions { kv_bytes: 320 << 10, ..WorkerOptions::default() }).await;
    let kv = fixture.worker.engine("tiny").kv_tokens();
    let body = |i: usize| json!({"prompt": format!("{i} prompt"), "max_tokens": 150, "temperature": 0, "ignore_eos": true});
    let mut alone = Vec::new();
    for i in 0..8 {
        alone.push(fixture.ok("/v1/completions", body(i)).await["choices"][0]["text"].clone());
    }
    assert!(kv < 8 * 150, "{kv}");
    let together =
        futures_util::future::join_all((0..8).map(|i| fixture.ok("/v1/completions", body(i)))).await;
    for (i, answer) in together.iter().enumerate() {
        assert_eq!(answer["choices"][0]["text"], alone[i], "request {i}");
    }
    let metrics = fixture.get("/metrics").await.text().await.unwrap();
    let preemptions = metrics.lines().find(|l| l.starts_with("vllm:num_preemptions_total")).unwrap();
    assert!(!preemptions.ends_with(" 0"), "{preemptions}");
    fixture.worker.wait_until_idle("tiny").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replacing_a_model_under_load_fails_no_request_and_an_invalid_model_changes_nothing() {
    let fixture = fixture().await;
    let second = tempfile::tempdir().unwrap();
    TinyModel { seed: 2, ..TinyModel::default() }.write(second.path());
    let greedy =
        json!({"model": "tiny", "prompt": "abc", "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let before = fixture.ok("/v1/completions", greedy.clone()).await["choices"][0]["text"].clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let load = async {
        let mut seen = Vec::new();
        while !stop.load(Relaxed) {
            let answers =
                futures_util::future::join_all((0..4).map(|_| fixture.ok("/v1/completions", greedy.clone())))
                    .await;
            seen.extend(answers.into_iter().map(|a| a["choices"][0]["text"].clone()));
        }
        seen
    };
    let swap = async {
        for round in 0..6 {
            let path: &Path = if round % 2 == 0 { second.path() } else { fixture.directory.path() };
            let answer = fixture.ok("/admin/models", json!({"name": "tiny", "path": path})).await;
            assert_eq!(answer["version"], (round + 2).to_string());
            let (status, error) =
                fixture.error("/admin/models", r#"{"name":"tiny","path":"/nonexistent"}"#).await;
            assert!(status == 422 && error["message"].as_str().unwrap().contains("/nonexistent"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        fixture.ok("/admin/models", json!({"name": "tiny", "path": second.path()})).await;
        stop.store(true, Relaxed);
    };
    let (seen, ()) = tokio::join!(load, swap);
    let after = fixture.ok("/v1/completions", greedy.clone()).await["choices"][0]["text"].clone();
    assert_ne!(before, after);
    assert!(
        seen.contains(&before) && seen.iter().all(|t| *t == before || *t == after),
        "each response is of one model only"
    );
    let (status, _) = fixture.error("/admin/models", r#"{"path":"/x","nmae":"y"}"#).await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn several_models_and_versions_can_be_served_and_removed() {
    let fixture = fixture().await;
    let second = tempfile::tempdir().unwrap();
    TinyModel { seed: 2, ..TinyModel::default() }.write(second.path());
    fixture.ok("/admin/models", json!({"name": "other", "path": second.path()})).await;
    fixture.ok("/admin/models", json!({"name": "tiny", "path": second.path(), "keep_old": true})).await;
    let text = async |model: &str| {
        let body =
            json!({"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": true});
        fixture.ok("/v1/completions", body).await["choices"][0]["text"].clone()
    };
    assert_eq!(text("tiny").await, text("other").await);
    assert_ne!(text("tiny@1").await, text("tiny@2").await);
    let delete =
        |name: &str| fixture.client.delete(format!("{}/admin/models/{name}", fixture.worker.url)).send();
    assert_eq!(delete("tiny").await.unwrap().status(), 200);
    assert_eq!(delete("other").await.unwrap().status(), 409, "the only model cannot be removed");
    let (status, error) = fixture.error("/v1/completions", r#"{"model":"tiny","prompt":"a"}"#).await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    text("other").await;
}
