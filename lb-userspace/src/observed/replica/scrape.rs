//! Converts a server's metrics page into a [`Report`], as our own worker sends it.
//!
//! Input: a page and the service's settings; the token counter of the previous page. Output: a [`Report`].
//! Pure. Metric names are those that the projects document, followed by those of older versions; a service may
//! configure others.

use super::exposition::{self, PAGE_LIMIT, Sample};
use crate::desired::model::{
    GpuMemory, Phase, Quantity, ReplicaSource, Report, ReportError, Selector, SourceKind, gpu_memory,
    report_name, requests, share, tokens,
};
use std::{collections::BTreeMap, time::Duration};

use Quantity::{
    Awake, Capacity, GpuMemoryTotal, GpuMemoryUsed, KvCacheUsage, Running, TokensPerSecond, TokensTotal,
    Waiting,
};

/// Default metric names of a kind of server: the first that is on the page is used.
fn default_names(kind: SourceKind) -> &'static [(Quantity, &'static [&'static str])] {
    match kind {
        SourceKind::Stream | SourceKind::Custom => &[],
        SourceKind::Vllm => &[
            (Running, &["vllm:num_requests_running"]),
            (Waiting, &["vllm:num_requests_waiting"]),
            // vLLM before about 0.10 has the second name.
            (KvCacheUsage, &["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"]),
            (TokensTotal, &["vllm:generation_tokens_total"]),
            (Awake, &["vllm:engine_sleep_state{sleep_state=\"awake\"}"]),
        ],
        // Newer versions add one sample per priority; the total has no priority label.
        SourceKind::Sglang => &[
            (Running, &["sglang:num_running_reqs{priority=\"\"}"]),
            (Waiting, &["sglang:num_queue_reqs{priority=\"\"}"]),
            (KvCacheUsage, &["sglang:token_usage{priority=\"\"}"]),
            (TokensPerSecond, &["sglang:gen_throughput{priority=\"\"}"]),
        ],
        SourceKind::Tgi => &[
            (Running, &["tgi_batch_current_size"]),
            (Waiting, &["tgi_queue_size"]),
            (TokensTotal, &["tgi_request_generated_tokens_sum"]),
        ],
        SourceKind::Triton => &[
            (Running, &["nv_trt_llm_request_metrics{request_type=\"scheduled\"}"]),
            (
                Waiting,
                &[
                    "nv_trt_llm_request_metrics{request_type=\"waiting\"}",
                    "nv_inference_pending_request_count",
                ],
            ),
            (Capacity, &["nv_trt_llm_request_metrics{request_type=\"max\"}"]),
            (KvCacheUsage, &["nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=\"fraction\"}"]),
            (GpuMemoryUsed, &["nv_gpu_memory_used_bytes"]),
            (GpuMemoryTotal, &["nv_gpu_memory_total_bytes"]),
        ],
    }
}

/// Whether every page of this kind of server has the quantity.
fn is_required(kind: SourceKind, quantity: Quantity) -> bool {
    match kind {
        SourceKind::Stream | SourceKind::Custom => false,
        // Triton without TensorRT-LLM reports only waiting requests.
        SourceKind::Triton => quantity == Waiting,
        _ => matches!(quantity, Running | Waiting),
    }
}

/// Converts the metrics pages of one replica: knows each quantity's names in order of preference.
#[derive(Clone, Debug)]
pub struct Scraper {
    kind: SourceKind,
    wanted: Vec<(Quantity, Vec<Selector>)>,
    /// Token counter of the previous page, and its time.
    tokens: Option<(f64, Duration)>,
}

/// Sum, maximum and number of one selector's samples.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    sum: f64,
    most: f64,
    count: u32,
}

impl Scraper {
    /// Creates a scraper from a service's settings.
    pub fn new(source: &ReplicaSource) -> Self {
        let mut wanted: BTreeMap<Quantity, Vec<Selector>> = default_names(source.kind)
            .iter()
            .map(|&(quantity, names)| {
                let parse =
                    |n: &&str| n.parse().expect("the default names are valid selectors: a test checks them");
                (quantity, names.iter().map(parse).collect())
            })
            .collect();
        for (&quantity, selector) in &source.metrics {
            wanted.insert(quantity, vec![selector.clone()]);
        }
        Self { kind: source.kind, wanted: wanted.into_iter().collect(), tokens: None }
    }

    /// Converts a page that was read at `now` of a monotonic clock into a report.
    ///
    /// # Errors
    /// The page is not a metrics page, belongs to another server, or has implausible numbers.
    pub fn report(&mut self, page: &[u8], now: Duration) -> Result<Report, ReportError> {
        if page.len() > PAGE_LIMIT {
            return Err(ReportError::TooLarge { limit: PAGE_LIMIT });
        }
        let page = std::str::from_utf8(page).map_err(|_| ReportError::NotMetrics {
            line: 1,
            what: "the page is not UTF-8 text".to_owned(),
        })?;
        let (found, model) = self.collect(page)?;
        let one = |quantity: Quantity| found.get(&quantity).copied();
        let count = |quantity: Quantity| match one(quantity) {
            Some((selector, found)) => requests(&selector.to_string(), found.sum).map(Some),
            None => Ok(None),
        };
        for (quantity, names) in &self.wanted {
            let asked_for = self.kind == SourceKind::Custom && matches!(quantity, Running | Waiting);
            if one(*quantity).is_none() && (asked_for || is_required(self.kind, *quantity)) {
                let name = names.first().map(ToString::to_string).unwrap_or_default();
                return Err(ReportError::Missing { name, kind: self.kind.label() });
            }
        }
        let kv = one(KvCacheUsage).map(|(s, f)| share(&s.to_string(), f.most)).transpose()?;
        let memory = match (one(GpuMemoryUsed), one(GpuMemoryTotal)) {
            (Some((_, used)), Some((_, total))) => Some(gpu_memory(used.sum, total.sum)?),
            _ => None,
        };
        let gauge = one(TokensPerSecond).map(|(s, f)| tokens(&s.to_string(), f.sum)).transpose()?;
        let total = one(TokensTotal).map(|(_, f)| f.sum);
        let asleep = one(Awake).is_some_and(|(_, f)| f.most == 0.0);
        let report = Report {
            phase: if asleep { Phase::Loading } else { Phase::Ready },
            model,
            version: None,
            running: count(Running)?.unwrap_or(0),
            waiting: count(Waiting)?.unwrap_or(0),
            kv_cache_usage: kv,
            capacity: count(Capacity)?.filter(|&n| n > 0),
            queue: None,
            tokens_per_second: gauge.or_else(|| self.rate(total, now)),
            gpu_memory: memory.filter(|m: &GpuMemory| m.total_bytes > 0),
            time_ms: None,
            answers: None,
        };
        self.tokens = total.map(|total| (total, now));
        Ok(report)
    }

    /// Collects samples by quantity, each with the selector that matched, and the model's name.
    fn collect(
        &self,
        page: &str,
    ) -> Result<(BTreeMap<Quantity, (&Selector, Found)>, Option<String>), ReportError> {
        let selectors: Vec<(Quantity, &Selector)> =
            self.wanted.iter().flat_map(|(q, names)| names.iter().map(|s| (*q, s))).collect();
        let mut found = vec![Found::default(); selectors.len()];
        let mut model = None;
        let wanted = |name: &str| selectors.iter().any(|(_, s)| s.name == name);
        exposition::read(page, wanted, |sample: Sample<'_>| {
            for ((quantity, selector), found) in selectors.iter().zip(&mut found) {
                if sample.matches(selector) {
                    found.sum += sample.value;
                    // `f64::max` would ignore NaN.
                    if found.count == 0 || sample.value.is_nan() || sample.value > found.most {
                        found.most = sample.value;
                    }
                    found.count += 1;
                    if *quantity == Running && model.is_none() {
                        model = sample.label("model_name").or_else(|| sample.label("model"));
                    }
                }
            }
        })?;
        let mut best: BTreeMap<Quantity, (&Selector, Found)> = BTreeMap::new();
        for ((quantity, selector), found) in selectors.into_iter().zip(found).filter(|(_, f)| f.count > 0) {
            best.entry(quantity).or_insert((selector, found));
        }
        let model = model.map(|m| report_name("model", &m)).transpose()?;
        Ok((best, model))
    }

    /// Rate of the token counter since the previous page; None for the first page and after a reset.
    fn rate(&self, total: Option<f64>, now: Duration) -> Option<f64> {
        let (total, (before, then)) = (total?, self.tokens?);
        let seconds = now.saturating_sub(then).as_secs_f64();
        let rate = (total - before) / seconds;
        (seconds > 0.0 && total >= before).then(|| tokens("tokens", rate).ok()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VLLM: &str = include_str!("../../../tests/replica/vllm.txt");
    const VLLM_OLD: &str = include_str!("../../../tests/replica/vllm-0.4.txt");
    const OURS: &str = include_str!("../../../tests/replica/inference-worker.txt");
    const SGLANG: &str = include_str!("../../../tests/replica/sglang.txt");
    const TGI: &str = include_str!("../../../tests/replica/tgi.txt");
    const TRITON: &str = include_str!("../../../tests/replica/triton.txt");
    const TRITON_LLM: &str = include_str!("../../../tests/replica/triton-tensorrt-llm.txt");

    fn scraper(json: &str) -> Scraper {
        Scraper::new(&serde_json::from_str(json).unwrap())
    }

    fn report(kind: &str, page: &str) -> Result<Report, String> {
        let page = page.as_bytes();
        scraper(&format!("{{\"kind\":\"{kind}\"}}")).report(page, Duration::ZERO).map_err(|e| e.to_string())
    }

    #[test]
    fn each_servers_page_becomes_a_report() {
        for (kind, page, running, waiting, kv, capacity, model) in [
            ("vllm", VLLM, 24, 72, Some(0.9813), None, Some("meta-llama/Llama-3.1-8B-Instruct")),
            ("vllm", VLLM_OLD, 3, 0, Some(0.0423), None, Some("facebook/opt-125m")),
            ("vllm", OURS, 2, 1, Some(0.0078125), None, Some("smol")),
            ("sglang", SGLANG, 162, 2_826, Some(0.28), None, Some("meta-llama/Llama-3.1-8B-Instruct")),
            ("tgi", TGI, 7, 12, None, None, None),
            ("triton", TRITON, 0, 14, None, None, None),
            ("triton", TRITON_LLM, 4, 3, Some(0.6), Some(512), Some("tensorrt_llm")),
        ] {
            let got = report(kind, page).unwrap();
            let found = (got.running, got.waiting, got.kv_cache_usage, got.capacity, got.model.as_deref());
            assert_eq!(found, (running, waiting, kv, capacity, model), "{kind}");
            assert_eq!(got.phase, Phase::Ready, "{kind}");
        }
        assert_eq!(report("sglang", SGLANG).unwrap().tokens_per_second, Some(86.5));
        let memory = report("triton", TRITON).unwrap().gpu_memory.unwrap();
        assert_eq!((memory.used_bytes, memory.total_bytes), (60_129_542_144, 85_899_345_920), "two GPUs");
    }

    #[test]
    fn a_page_of_another_server_is_refused_by_the_name_that_is_missing() {
        for (kind, page, expected) in [
            (
                "vllm",
                SGLANG,
                "the page has no metric vllm:num_requests_running: check that it is a vllm page",
            ),
            ("sglang", VLLM, "the page has no metric sglang:num_running_reqs{priority=\"\"}: "),
            ("tgi", TRITON, "the page has no metric tgi_batch_current_size"),
            ("triton", TGI, "the page has no metric nv_trt_llm_request_metrics{request_type=\"waiting\"}"),
            ("vllm", "<html>", "line 1 is not a valid metric"),
            ("vllm", "", "the page has no metric vllm:num_requests_running"),
        ] {
            let error = report(kind, page).unwrap_err();
            assert!(error.starts_with(expected), "{kind}: {error}");
        }
    }

    #[test]
    fn a_lying_page_is_refused_by_name() {
        for (from, to, expected) in [
            (
                "running{engine=\"0\",model_name=\"meta-llama/Llama-3.1-8B-Instruct\"} 24.0",
                "running -1",
                "is -1, must be",
            ),
            (
                "running{engine=\"0\",model_name=\"meta-llama/Llama-3.1-8B-Instruct\"} 24.0",
                "running NaN",
                "is NaN, must be",
            ),
            (
                "running{engine=\"0\",model_name=\"meta-llama/Llama-3.1-8B-Instruct\"} 24.0",
                "running 1e12",
                "must be 0 to 1000000",
            ),
            ("0.9813", "+Inf", "kv_cache_usage_perc is inf, must be 0 to 1"),
            ("0.9813", "98.13", "kv_cache_usage_perc is 98.13, must be 0 to 1"),
        ] {
            let page = VLLM.replacen(from, to, 1);
            assert_ne!(page, VLLM, "{from}");
            let error = report("vllm", &page).unwrap_err();
            assert!(error.contains(expected) && error.starts_with("vllm:"), "{error}");
        }
        let huge = "# x\n".repeat(PAGE_LIMIT / 4 + 1);
        assert!(report("vllm", &huge).unwrap_err().contains("more than 4194304 bytes"));
    }

    #[test]
    fn counters_become_rates_and_sleep_is_seen() {
        let mut vllm = scraper(r#"{"kind":"vllm"}"#);
        let page = |tokens: u64| VLLM.replace("} 7557572.0", &format!("}} {tokens}"));
        let mut rate = |tokens, at| {
            vllm.report(page(tokens).as_bytes(), Duration::from_secs(at)).unwrap().tokens_per_second
        };
        assert_eq!(
            [rate(1_000, 1), rate(1_500, 3), rate(10, 4), rate(10, 5)],
            [None, Some(250.0), None, Some(0.0)]
        );
        let asleep = VLLM.replace("sleep_state=\"awake\"} 1.0", "sleep_state=\"awake\"} 0.0");
        assert_eq!(report("vllm", &asleep).unwrap().phase, Phase::Loading);
    }

    #[test]
    fn names_may_be_given() {
        let mut custom = scraper(
            r#"{"kind":"custom","metrics":{"running":"busy{pool=\"a\"}","kv_cache_usage":"cache","capacity":"slots"}}"#,
        );
        let page =
            "busy{pool=\"a\"} 3\nbusy{pool=\"b\"} 9\ncache{gpu=\"0\"} 0.2\ncache{gpu=\"1\"} 0.7\nslots 4\n";
        let got = custom.report(page.as_bytes(), Duration::ZERO).unwrap();
        assert_eq!((got.running, got.waiting, got.kv_cache_usage, got.capacity), (3, 0, Some(0.7), Some(4)));
        let error = custom.report(b"slots 4\n", Duration::ZERO).unwrap_err().to_string();
        assert!(
            error.starts_with("the page has no metric busy{pool=\"a\"}: check that it is a custom page"),
            "{error}"
        );
        let mut renamed = scraper(r#"{"kind":"vllm","metrics":{"waiting":"my_queue"}}"#);
        let page = format!("{VLLM}my_queue 5\n");
        assert_eq!(renamed.report(page.as_bytes(), Duration::ZERO).unwrap().waiting, 5);
    }
}
