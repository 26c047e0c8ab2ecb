//! Metrics under vLLM's names, so that dashboards, routers and autoscalers made for vLLM work unchanged.
//!
//! Counters and histograms are written where things happen; gauges are set when `/metrics` is read.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use std::sync::{Arc, atomic::AtomicU64};

use crate::engine::output::Finish;

/// The label that vLLM puts on everything.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    /// Name as clients know it.
    pub model_name: String,
}

/// Label of finished requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FinishLabel {
    /// Name as clients know it.
    pub model_name: String,
    /// stop, length or abort.
    pub finished_reason: String,
}

/// Label of rejected requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StatusLabel {
    /// HTTP status.
    pub code: u16,
}

type FloatGauge = Gauge<f64, AtomicU64>;
type Histograms = Family<ModelLabel, Histogram, fn() -> Histogram>;

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Sequences running.
    pub running: Family<ModelLabel, Gauge>,
    /// Sequences waiting.
    pub waiting: Family<ModelLabel, Gauge>,
    /// Share of the KV cache held, 0 to 1.
    pub kv_usage: Family<ModelLabel, FloatGauge>,
    /// The same under vLLM's older name.
    pub kv_usage_old: Family<ModelLabel, FloatGauge>,
    /// Answers by status.
    pub http: Family<StatusLabel, Counter>,
    prompt_tokens: Family<ModelLabel, Counter>,
    generation_tokens: Family<ModelLabel, Counter>,
    success: Family<FinishLabel, Counter>,
    prefix_queries: Family<ModelLabel, Counter>,
    prefix_hits: Family<ModelLabel, Counter>,
    preemptions: Family<ModelLabel, Counter>,
    time_to_first_token: Histograms,
    time_per_output_token: Histograms,
    e2e_latency: Histograms,
    queue_time: Histograms,
}

/// One model's share of them.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    model: String,
    /// Prompt tokens computed.
    pub prompt_tokens: Counter,
    /// Tokens generated.
    pub generation_tokens: Counter,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: Counter,
    /// Prompt tokens found there.
    pub prefix_hits: Counter,
    /// Sequences that gave way.
    pub preemptions: Counter,
    /// Arrival to first token, seconds.
    pub time_to_first_token: Histogram,
    /// Token to token, seconds.
    pub time_per_output_token: Histogram,
    /// Arrival to end, seconds.
    pub e2e_latency: Histogram,
    /// Arrival to start, seconds.
    pub queue_time: Histogram,
    success: Family<FinishLabel, Counter>,
}

fn long_buckets() -> Histogram {
    Histogram::new([
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
        40.0, 80.0,
    ])
}

fn token_buckets() -> Histogram {
    Histogram::new([0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5])
}

fn request_buckets() -> Histogram {
    Histogram::new([
        0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    ])
}

impl Metrics {
    /// A fresh set.
    pub fn new() -> Arc<Self> {
        let mut m = Self {
            registry: Registry::default(),
            running: Family::default(),
            waiting: Family::default(),
            kv_usage: Family::default(),
            kv_usage_old: Family::default(),
            http: Family::default(),
            prompt_tokens: Family::default(),
            generation_tokens: Family::default(),
            success: Family::default(),
            prefix_queries: Family::default(),
            prefix_hits: Family::default(),
            preemptions: Family::default(),
            time_to_first_token: Family::new_with_constructor(long_buckets as fn() -> Histogram),
            time_per_output_token: Family::new_with_constructor(token_buckets as fn() -> Histogram),
            e2e_latency: Family::new_with_constructor(request_buckets as fn() -> Histogram),
            queue_time: Family::new_with_constructor(request_buckets as fn() -> Histogram),
        };
        let r = &mut m.registry;
        r.register("vllm:num_requests_running", "Requests being computed", m.running.clone());
        r.register("vllm:num_requests_waiting", "Requests waiting to be computed", m.waiting.clone());
        r.register("vllm:kv_cache_usage_perc", "KV-cache use, 1 is full", m.kv_usage.clone());
        r.register("vllm:gpu_cache_usage_perc", "KV-cache use under its older name", m.kv_usage_old.clone());
        r.register("vllm:prompt_tokens", "Prompt tokens computed", m.prompt_tokens.clone());
        r.register("vllm:generation_tokens", "Tokens generated", m.generation_tokens.clone());
        r.register("vllm:request_success", "Finished requests by reason", m.success.clone());
        r.register(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            m.prefix_queries.clone(),
        );
        r.register(
            "vllm:prefix_cache_hits",
            "Prompt tokens found in the prefix cache",
            m.prefix_hits.clone(),
        );
        r.register("vllm:num_preemptions", "Requests that gave way to older ones", m.preemptions.clone());
        r.register(
            "vllm:time_to_first_token_seconds",
            "Arrival to first token",
            m.time_to_first_token.clone(),
        );
        r.register("vllm:time_per_output_token_seconds", "Token to token", m.time_per_output_token.clone());
        r.register(
            "vllm:inter_token_latency_seconds",
            "Token to token, under its newer name",
            m.time_per_output_token.clone(),
        );
        r.register("vllm:e2e_request_latency_seconds", "Arrival to end", m.e2e_latency.clone());
        r.register("vllm:request_queue_time_seconds", "Arrival to start", m.queue_time.clone());
        r.register("lb_worker_http_responses", "Answers by status", m.http.clone());
        Arc::new(m)
    }

    /// The share of a model.
    pub fn model(&self, name: &str) -> ModelMetrics {
        let label = ModelLabel { model_name: name.into() };
        for reason in [Finish::Stop, Finish::Length, Finish::Abort] {
            drop(self.success.get_or_create(&finish_label(name, reason)));
        }
        ModelMetrics {
            model: name.into(),
            prompt_tokens: self.prompt_tokens.get_or_create_owned(&label),
            generation_tokens: self.generation_tokens.get_or_create_owned(&label),
            prefix_queries: self.prefix_queries.get_or_create_owned(&label),
            prefix_hits: self.prefix_hits.get_or_create_owned(&label),
            preemptions: self.preemptions.get_or_create_owned(&label),
            time_to_first_token: self.time_to_first_token.get_or_create_owned(&label),
            time_per_output_token: self.time_per_output_token.get_or_create_owned(&label),
            e2e_latency: self.e2e_latency.get_or_create_owned(&label),
            queue_time: self.queue_time.get_or_create_owned(&label),
            success: self.success.clone(),
        }
    }

    /// Everything in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut out, &self.registry);
        out
    }
}

fn finish_label(model: &str, finish: Finish) -> FinishLabel {
    FinishLabel { model_name: model.into(), finished_reason: finish.name().into() }
}

impl ModelMetrics {
    /// Counts a finished request.
    pub fn finished(&self, finish: Finish) {
        self.success.get_or_create(&finish_label(&self.model, finish)).inc();
    }
}
