//! Metrics with vLLM's names, so that dashboards, routers and autoscalers for vLLM work unchanged.
//!
//! The engine and the API update counters and histograms; gauges are set when `/metrics` is requested.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use std::sync::{Arc, atomic::AtomicU64};

use crate::engine::output::FinishReason;

/// Label of all metrics of a model.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ModelLabel {
    /// Name of the model.
    pub model_name: String,
}

/// Labels of finished requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FinishLabel {
    /// Name of the model.
    pub model_name: String,
    /// `stop`, `length` or `abort`.
    pub finished_reason: String,
}

/// Label of HTTP responses.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StatusLabel {
    /// HTTP status code.
    pub code: u16,
}

type FloatGauge = Gauge<f64, AtomicU64>;
type Histograms = Family<ModelLabel, Histogram, fn() -> Histogram>;

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Running sequences.
    pub running: Family<ModelLabel, Gauge>,
    /// Waiting sequences.
    pub waiting: Family<ModelLabel, Gauge>,
    /// Used fraction of the KV cache, 0 to 1.
    pub kv_usage: Family<ModelLabel, FloatGauge>,
    /// `kv_usage` under the name that older versions of vLLM use.
    pub kv_usage_old: Family<ModelLabel, FloatGauge>,
    /// HTTP responses by status code.
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

/// Metrics of one model.
#[derive(Debug, Clone)]
pub struct ModelMetrics {
    model: String,
    /// Prompt tokens computed.
    pub prompt_tokens: Counter,
    /// Generated tokens.
    pub generation_tokens: Counter,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: Counter,
    /// Prompt tokens found in the prefix cache.
    pub prefix_hits: Counter,
    /// Preemptions.
    pub preemptions: Counter,
    /// Time from arrival to first token, in seconds.
    pub time_to_first_token: Histogram,
    /// Time between two tokens, in seconds.
    pub time_per_output_token: Histogram,
    /// Time from arrival to end, in seconds.
    pub e2e_latency: Histogram,
    /// Time from arrival to first step, in seconds.
    pub queue_time: Histogram,
    success: Family<FinishLabel, Counter>,
}

fn first_token_buckets() -> Histogram {
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
    /// Creates all metrics.
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
            time_to_first_token: Family::new_with_constructor(first_token_buckets as fn() -> Histogram),
            time_per_output_token: Family::new_with_constructor(token_buckets as fn() -> Histogram),
            e2e_latency: Family::new_with_constructor(request_buckets as fn() -> Histogram),
            queue_time: Family::new_with_constructor(request_buckets as fn() -> Histogram),
        };
        m.register_all();
        Arc::new(m)
    }

    fn register_all(&mut self) {
        let r = &mut self.registry;
        r.register("vllm:num_requests_running", "Running requests", self.running.clone());
        r.register("vllm:num_requests_waiting", "Waiting requests", self.waiting.clone());
        r.register(
            "vllm:kv_cache_usage_perc",
            "Used fraction of the KV cache, 0 to 1",
            self.kv_usage.clone(),
        );
        r.register(
            "vllm:gpu_cache_usage_perc",
            "Used fraction of the KV cache, 0 to 1, under its older name",
            self.kv_usage_old.clone(),
        );
        r.register("vllm:prompt_tokens", "Prompt tokens computed", self.prompt_tokens.clone());
        r.register("vllm:generation_tokens", "Generated tokens", self.generation_tokens.clone());
        r.register("vllm:request_success", "Finished requests by finish reason", self.success.clone());
        r.register(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            self.prefix_queries.clone(),
        );
        r.register(
            "vllm:prefix_cache_hits",
            "Prompt tokens found in the prefix cache",
            self.prefix_hits.clone(),
        );
        r.register(
            "vllm:num_preemptions",
            "Preemptions of running requests by older ones",
            self.preemptions.clone(),
        );
        r.register(
            "vllm:time_to_first_token_seconds",
            "Time from arrival to first token",
            self.time_to_first_token.clone(),
        );
        r.register(
            "vllm:time_per_output_token_seconds",
            "Time between two tokens",
            self.time_per_output_token.clone(),
        );
        r.register(
            "vllm:inter_token_latency_seconds",
            "Time between two tokens, under its newer name",
            self.time_per_output_token.clone(),
        );
        r.register("vllm:e2e_request_latency_seconds", "Time from arrival to end", self.e2e_latency.clone());
        r.register(
            "vllm:request_queue_time_seconds",
            "Time from arrival to first step",
            self.queue_time.clone(),
        );
        r.register("lb_worker_http_responses", "HTTP responses by status code", self.http.clone());
    }

    /// Returns the metrics of a model.
    pub fn model(&self, name: &str) -> ModelMetrics {
        let label = ModelLabel { model_name: name.into() };
        for reason in [FinishReason::Stop, FinishReason::Length, FinishReason::Abort] {
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

    /// Returns all metrics in the OpenMetrics text format.
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut out, &self.registry);
        out
    }
}

fn finish_label(model: &str, reason: FinishReason) -> FinishLabel {
    FinishLabel { model_name: model.into(), finished_reason: reason.name().into() }
}

impl ModelMetrics {
    /// Counts a finished request.
    pub fn count_finished(&self, reason: FinishReason) {
        self.success.get_or_create(&finish_label(&self.model, reason)).inc();
    }
}
