//! The HTTP API on a tiny random model: shapes, errors, limits, life. No download needed.

#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::{
    path::Path,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use futures_util::StreamExt;
use inference_worker::{
    api::Settings,
    engine::EngineOptions,
    testing::{Tiny, Worker, WorkerOptions},
};
use reqwest::{Client, Response};
use serde_json::{Value as Json, json};

struct Bed {
    worker: Worker,
    client: Client,
    folder: tempfile::TempDir,
}

async fn bed_with(options: WorkerOptions) -> Bed {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let worker = Worker::start(&[("tiny", folder.path())], options).await;
    Bed { worker, client: Client::new(), folder }
}

async fn bed() -> Bed {
    bed_with(WorkerOptions::default()).await
}

impl Bed {
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

    /// Status, and OpenAI's error object.
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

fn events(text: &str) -> Vec<Json> {
    let data: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("data: ")).collect();
    let (done, chunks) = data.split_last().unwrap();
    assert_eq!(*done, "[DONE]");
    chunks.iter().map(|c| serde_json::from_str(c).unwrap()).collect()
}

#[tokio::test]
async fn streamed_and_whole_answers_agree() {
    let bed = bed().await;
    let mut body =
        json!({"model": "tiny", "prompt": "Hello", "max_tokens": 20, "temperature": 0, "ignore_eos": true});
    let whole = bed.ok("/v1/completions", body.clone()).await;
    assert_eq!(
        whole["usage"],
        json!({"prompt_tokens": 5, "completion_tokens": 20, "total_tokens": 25,
                                      "prompt_tokens_details": {"cached_tokens": 0}})
    );
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let response = bed.post("/v1/completions", body).await;
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/event-stream"));
    let chunks = events(&response.text().await.unwrap());
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["text"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap());
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 20);

    let mut body = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 9,
                          "temperature": 0, "ignore_eos": true});
    let whole = bed.ok("/v1/chat/completions", body.clone()).await;
    assert_eq!(whole["object"], "chat.completion");
    body["stream"] = true.into();
    let chunks = events(&bed.post("/v1/chat/completions", body).await.text().await.unwrap());
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, whole["choices"][0]["message"]["content"].as_str().unwrap());
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn choices_seeds_logprobs_echo_and_stops() {
    let bed = bed().await;
    let body = json!({"prompt": ["ab", "cd"], "n": 2, "max_tokens": 6, "seed": 3, "ignore_eos": true, "logprobs": 2, "echo": true});
    let first = bed.ok("/v1/completions", body.clone()).await;
    let again = bed.ok("/v1/completions", body).await;
    assert_eq!(first["choices"], again["choices"], "a seed repeats");
    let choices = first["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 4);
    assert_ne!(choices[0]["text"], choices[1]["text"], "choices differ");
    assert!(choices[2]["text"].as_str().unwrap().starts_with("cd"));
    let l = &choices[0]["logprobs"];
    assert_eq!(l["tokens"].as_array().unwrap().len(), 8);
    assert!(l["token_logprobs"][0].is_null() && l["token_logprobs"][1].as_f64().unwrap() < 0.0);
    assert_eq!(l["text_offset"], json!([0, 1, 2, 3, 4, 5, 6, 7]));

    // Whatever greedy writes first becomes a stop string the second time.
    let greedy = json!({"prompt": "stop", "max_tokens": 12, "temperature": 0, "ignore_eos": true});
    let text =
        bed.ok("/v1/completions", greedy.clone()).await["choices"][0]["text"].as_str().unwrap().to_owned();
    let stop: String = text.chars().skip(3).take(2).collect();
    let mut stopped = greedy.clone();
    stopped["stop"] = json!([stop]);
    let answer = bed.ok("/v1/completions", stopped).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let kept = answer["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with(kept) && !kept.contains(&stop), "{text:?} cut to {kept:?} at {stop:?}");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 12);

    let chat = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": true, "top_logprobs": 4, "ignore_eos": true});
    let answer = bed.ok("/v1/chat/completions", chat).await;
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!((content.len(), content[0]["top_logprobs"].as_array().unwrap().len()), (3, 4));
}

#[tokio::test]
async fn bad_input_is_a_clear_client_error() {
    let bed = bed().await;
    let chat = "/v1/chat/completions";
    let text = "/v1/completions";
    for (path, body, status, says) in [
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
        (text, r#"{"prompt":"a","max_tokens":"ten"}"#, 400, "`max_tokens` is not as expected"),
        (text, r#"{"prompt":"a","max_tokens":1,"max_tokens":2}"#, 400, "duplicate field `max_tokens`"),
        (text, r#"{"prompt":"a","stop":7}"#, 400, "`stop` is not as expected: expected a text or"),
        (text, r#"{"prompt":"a","seed":1.5}"#, 400, "`seed`"),
        (chat, r#"{"messages":"hello"}"#, 400, "`messages` is not as expected"),
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
        let (got, error) = bed.error(path, body).await;
        let message = error["message"].as_str().unwrap();
        assert!(got == status && message.contains(says), "{path} {body}: {got} {message}");
    }
    let long = json!({"prompt": "x".repeat(600)}).to_string();
    let (status, error) = bed.error(text, &long).await;
    assert_eq!((status, &error["code"]), (400, &json!("context_length_exceeded")));
    assert!(error["message"].as_str().unwrap().contains("512"));
    let (status, _) = bed.error(text, &json!({"prompt": "x".repeat(9 << 20)}).to_string()).await;
    assert_eq!(status, 413);
    let bad = bed
        .client
        .post(format!("{}{text}", bed.worker.url))
        .body(vec![b'"', 0xFF, 0xFE, b'"'])
        .send()
        .await
        .unwrap();
    assert_eq!(bad.status(), 400);
    assert!(bad.text().await.unwrap().contains("UTF-8"));
    bed.worker.settle("tiny").await;
    bed.ok(text, json!({"prompt": "still here", "max_tokens": 2})).await;
}

#[tokio::test]
async fn unknown_fields_are_ignored_and_request_ids_returned() {
    let bed = bed().await;
    bed.ok(
        "/v1/completions",
        json!({"prompt": "a", "max_tokens": 1, "bootstrap_room": 7, "cache_salt": "x"}),
    )
    .await;
    let with_id = |id: &'static str| {
        bed.client.get(format!("{}/v1/models", bed.worker.url)).header("x-request-id", id).send()
    };
    assert_eq!(with_id("abc-1").await.unwrap().headers()["x-request-id"], "abc-1");
    assert_eq!(with_id("a b\"").await.unwrap().headers()["x-request-id"].len(), 32);
    let load = bed
        .client
        .get(format!("{}/v1/models", bed.worker.url))
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
async fn embeddings_have_unit_length_and_do_not_depend_on_company_or_chunks() {
    let options = EngineOptions { prompt_tokens: Some(32), ..EngineOptions::default() };
    let bed = bed_with(WorkerOptions { engine: options, ..WorkerOptions::default() }).await;
    let long = "the quick brown fox ".repeat(8);
    let both = bed.ok("/v1/embeddings", json!({"model": "tiny", "input": ["hello", long]})).await;
    let alone = bed.ok("/v1/embeddings", json!({"input": long})).await;
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
async fn tokenize_and_back() {
    let bed = bed().await;
    let t = bed.ok("/tokenize", json!({"prompt": "hé"})).await;
    assert_eq!(t["tokens"], json!([104, 195, 169]));
    assert_eq!(bed.ok("/detokenize", json!({"tokens": t["tokens"]})).await["prompt"], "hé");
    let chat = bed.ok("/tokenize", json!({"messages": [{"role": "user", "content": "x"}]})).await;
    assert_eq!(chat["tokens"][0], 256, "the template's special token is one token");
}

#[tokio::test]
async fn health_metrics_and_replica_tell_the_state() {
    let bed = bed().await;
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
        assert_eq!(bed.get(path).await.status(), 200, "{path}");
    }
    bed.ok("/v1/completions", json!({"prompt": "a", "max_tokens": 4, "ignore_eos": true})).await;
    bed.worker.settle("tiny").await;
    let metrics = bed.get("/metrics").await.text().await.unwrap();
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
    let state: Json = bed.get("/replica").await.json().await.unwrap();
    assert_eq!(
        (&state["phase"], &state["model"], &state["running"]),
        (&json!("ready"), &json!("tiny"), &json!(0))
    );
    assert_eq!(state["protocol"], 1);
    assert!(state["time_ms"].as_u64().is_some_and(|ms| ms > 1_600_000_000_000), "{state}");
    let stream = bed
        .client
        .get(format!("{}/replica", bed.worker.url))
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
    // A drain is told at once: before the next heartbeat, that is.
    bed.worker.app.phase.send_replace(inference_worker::api::Phase::Draining);
    let told = Instant::now();
    loop {
        let event =
            tokio::time::timeout(Duration::from_secs(3), stream.next()).await.unwrap().unwrap().unwrap();
        if String::from_utf8_lossy(&event).contains("\"phase\":\"draining\"") {
            break;
        }
    }
    assert!(told.elapsed() < Duration::from_millis(500), "{:?}", told.elapsed());
}

#[tokio::test]
async fn a_key_opens_what_it_is_for_and_nothing_else() {
    let settings = Settings {
        api_keys: vec!["k1".into(), "k2".into()],
        admin_key: Some("boss".into()),
        name: Some("gpu-1".parse().unwrap()),
        ..Settings::default()
    };
    let bed = bed_with(WorkerOptions { settings, ..WorkerOptions::default() }).await;
    let call = |path: &str, key: &str| {
        bed.client.get(format!("{}{path}", bed.worker.url)).bearer_auth(key.to_owned()).send()
    };
    let refused = bed.get("/v1/models").await;
    assert_eq!(refused.status(), 401);
    assert_eq!(refused.headers()["x-worker"], "gpu-1");
    assert_eq!(call("/v1/models", "k").await.unwrap().status(), 401);
    assert_eq!(call("/v1/models", "k2").await.unwrap().status(), 200);
    assert_eq!(call("/admin/models", "k1").await.unwrap().status(), 403);
    assert_eq!(call("/admin/models", "boss").await.unwrap().status(), 200);
    assert_eq!(bed.get("/health").await.status(), 200, "probes need no key");
}

#[tokio::test]
async fn beyond_the_queue_the_answer_is_429_and_the_connection_closes() {
    let engine = EngineOptions { max_running: 1, max_queue: 1, ..EngineOptions::default() };
    let bed = bed_with(WorkerOptions { engine, ..WorkerOptions::default() }).await;
    let body = json!({"prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": true});
    let (one, two) =
        (bed.post("/v1/completions", body.clone()).await, bed.post("/v1/completions", body.clone()).await);
    assert_eq!((one.status().as_u16(), two.status().as_u16()), (200, 200));
    let third = bed.post("/v1/completions", body).await;
    assert_eq!(third.status(), 429);
    assert_eq!(third.headers()["retry-after"], "1");
    assert_eq!(third.headers()["connection"], "close");
    let error: Json = third.json().await.unwrap();
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    drop((one, two));
    bed.worker.settle("tiny").await;
    bed.ok("/v1/completions", json!({"prompt": "a", "max_tokens": 1})).await;
}

#[tokio::test]
async fn a_client_that_leaves_is_cancelled() {
    let bed = bed().await;
    let engine = bed.worker.engine("tiny");
    for stream in [true, false] {
        let body =
            json!({"prompt": "a", "max_tokens": 500, "ignore_eos": true, "stream": stream}).to_string();
        let request = bed.client.post(format!("{}/v1/completions", bed.worker.url)).body(body);
        let client = tokio::spawn(async move { request.send().await.unwrap().text().await });
        while engine.stats.running.load(Relaxed) == 0 {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        client.abort();
        bed.worker.settle("tiny").await;
    }
    let metrics = bed.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("finished_reason=\"abort\"} 2"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_cancelled_requests_leave_no_block_behind() {
    use inference_worker::engine::{Event, Generate, Request, Work};
    let bed = bed_with(WorkerOptions { kv_bytes: 1 << 20, ..WorkerOptions::default() }).await;
    let engine = bed.worker.engine("tiny");
    let mut sent = 0u32;
    while sent < 10_000 {
        let mut receivers = Vec::new();
        for i in 0..50u32 {
            let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
            let prompt: Vec<u32> = (0..(1 + (sent + i) % 90)).map(|t| (t * 7 + i % 3) % 256).collect();
            let generate = Generate { max_tokens: 100, ignore_eos: true, ..Generate::default() };
            let work = if i % 10 == 9 { Work::Embed } else { Work::Generate(Box::new(generate)) };
            let request = Request {
                prompt,
                work,
                events,
                arrived: std::time::Instant::now(),
                group: engine.new_group(),
            };
            engine.submit(vec![request]).unwrap();
            receivers.push(receiver);
        }
        sent += 50;
        // Some leave while waiting, some in their prompt, some while generating.
        if sent.is_multiple_of(200) {
            let first = receivers[0].recv().await;
            assert!(matches!(first, Some(Event::Token { .. })));
        }
        drop(receivers);
        while engine.stats.in_flight.load(Relaxed) > 50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    bed.worker.settle("tiny").await;
    assert_eq!(engine.stats.in_flight_tokens.load(Relaxed), 0);
    // Every block can be had: one request that needs the whole cache runs.
    let kv = engine.kv_tokens();
    let body = json!({"prompt": vec![65; kv.min(512) - 10], "max_tokens": 5, "ignore_eos": true});
    bed.ok("/v1/completions", body).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn short_of_blocks_all_requests_still_finish_with_the_same_text() {
    let bed = bed_with(WorkerOptions { kv_bytes: 320 << 10, ..WorkerOptions::default() }).await;
    let kv = bed.worker.engine("tiny").kv_tokens();
    let body = |i: usize| json!({"prompt": format!("{i} prompt"), "max_tokens": 150, "temperature": 0, "ignore_eos": true});
    let mut alone = Vec::new();
    for i in 0..8 {
        alone.push(bed.ok("/v1/completions", body(i)).await["choices"][0]["text"].clone());
    }
    assert!(kv < 8 * 150, "{kv}");
    let together = futures_util::future::join_all((0..8).map(|i| bed.ok("/v1/completions", body(i)))).await;
    for (i, answer) in together.iter().enumerate() {
        assert_eq!(answer["choices"][0]["text"], alone[i], "request {i}");
    }
    let metrics = bed.get("/metrics").await.text().await.unwrap();
    let preemptions = metrics.lines().find(|l| l.starts_with("vllm:num_preemptions_total")).unwrap();
    assert!(!preemptions.ends_with(" 0"), "{preemptions}");
    bed.worker.settle("tiny").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_swap_under_load_drops_nothing_and_a_bad_model_changes_nothing() {
    let bed = bed().await;
    let second = tempfile::tempdir().unwrap();
    Tiny { seed: 2, ..Tiny::default() }.write(second.path());
    let greedy =
        json!({"model": "tiny", "prompt": "abc", "max_tokens": 40, "temperature": 0, "ignore_eos": true});
    let before = bed.ok("/v1/completions", greedy.clone()).await["choices"][0]["text"].clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let load = async {
        let mut seen = Vec::new();
        while !stop.load(Relaxed) {
            let answers =
                futures_util::future::join_all((0..4).map(|_| bed.ok("/v1/completions", greedy.clone())))
                    .await;
            seen.extend(answers.into_iter().map(|a| a["choices"][0]["text"].clone()));
        }
        seen
    };
    let swap = async {
        for round in 0..6 {
            let path: &Path = if round % 2 == 0 { second.path() } else { bed.folder.path() };
            let answer = bed.ok("/admin/models", json!({"name": "tiny", "path": path})).await;
            assert_eq!(answer["version"], (round + 2).to_string());
            let (status, error) =
                bed.error("/admin/models", r#"{"name":"tiny","path":"/nonexistent"}"#).await;
            assert!(status == 422 && error["message"].as_str().unwrap().contains("/nonexistent"));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        bed.ok("/admin/models", json!({"name": "tiny", "path": second.path()})).await;
        stop.store(true, Relaxed);
    };
    let (seen, ()) = tokio::join!(load, swap);
    let after = bed.ok("/v1/completions", greedy.clone()).await["choices"][0]["text"].clone();
    assert_ne!(before, after);
    assert!(
        seen.contains(&before) && seen.iter().all(|t| *t == before || *t == after),
        "no answer is a mixture"
    );
    let (status, _) = bed.error("/admin/models", r#"{"path":"/x","nmae":"y"}"#).await;
    assert_eq!(status, 400);
}

#[tokio::test]
async fn several_models_and_versions_are_served_and_removed() {
    let bed = bed().await;
    let second = tempfile::tempdir().unwrap();
    Tiny { seed: 2, ..Tiny::default() }.write(second.path());
    bed.ok("/admin/models", json!({"name": "other", "path": second.path()})).await;
    bed.ok("/admin/models", json!({"name": "tiny", "path": second.path(), "keep_old": true})).await;
    let text = async |model: &str| {
        let body =
            json!({"model": model, "prompt": "abc", "max_tokens": 8, "temperature": 0, "ignore_eos": true});
        bed.ok("/v1/completions", body).await["choices"][0]["text"].clone()
    };
    assert_eq!(text("tiny").await, text("other").await);
    assert_ne!(text("tiny@1").await, text("tiny@2").await);
    let delete = |name: &str| bed.client.delete(format!("{}/admin/models/{name}", bed.worker.url)).send();
    assert_eq!(delete("tiny").await.unwrap().status(), 200);
    assert_eq!(delete("other").await.unwrap().status(), 409, "the last one stays");
    let (status, error) = bed.error("/v1/completions", r#"{"model":"tiny","prompt":"a"}"#).await;
    assert_eq!((status, &error["code"]), (404, &json!("model_not_found")));
    text("other").await;
}
