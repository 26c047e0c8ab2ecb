//! What `lbctl top` shows: samples, the rates between them, and what the keys have chosen.

use crate::{
    desired::model::{Name, Readiness},
    serve::api::types::{BackendInfo, ReplicaInfo, ServiceInfo, Stats, Status},
};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

/// Samples whose rates are kept for the sparkline.
pub const HISTORY: usize = 60;

/// One reading of lbd.
pub struct TopSample {
    /// When it was read.
    pub at: Instant,
    /// `GET /v1/status`.
    pub status: Status,
    /// `GET /v1/services`.
    pub services: Vec<ServiceInfo>,
    /// Backends of the service that is shown.
    pub backends: Vec<BackendInfo>,
    /// `GET /v1/stats`, for the reasons.
    pub stats: Stats,
    /// `GET /v1/replicas`, if a service watches replicas.
    pub replicas: Vec<ReplicaInfo>,
}

/// Rates per second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rates {
    /// New flows.
    pub flows: f64,
    /// Packets.
    pub packets: f64,
    /// Bytes.
    pub bytes: f64,
}

/// Counters of a service or backend with their rates.
#[derive(Clone, Debug, Default)]
struct Series {
    last: Option<(Instant, [u64; 3])>,
    rates: Option<Rates>,
    history: VecDeque<u64>,
}

impl Series {
    fn add(&mut self, at: Instant, counters: [u64; 3]) {
        if let Some((before, old)) = self.last {
            let seconds = at.duration_since(before).as_secs_f64().max(0.001);
            // After a restart of the host, counters begin at 0.
            let rate = |i: usize| counters[i].saturating_sub(old[i]) as f64 / seconds;
            let rates = Rates { flows: rate(0), packets: rate(1), bytes: rate(2) };
            self.rates = Some(rates);
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back(rates.packets.round() as u64);
        }
        self.last = Some((at, counters));
    }
}

/// What a row is about: a service, a backend of one, or a reason.
pub type RowKey = (String, String);

/// The page that is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Page {
    /// All services.
    Services,
    /// Backends of one service.
    Backends(Name),
    /// Reasons by which packets were not simply forwarded.
    Reasons,
}

/// Column that rows are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sort {
    /// Name.
    Name,
    /// New flows per second.
    Flows,
    /// Packets per second.
    Packets,
    /// Bytes per second.
    Bytes,
    /// Load.
    Load,
}

impl Sort {
    const ALL: [Self; 5] = [Self::Name, Self::Flows, Self::Packets, Self::Bytes, Self::Load];

    /// Word for the screen.
    pub fn label(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Flows => "new flows",
            Self::Packets => "packets",
            Self::Bytes => "rate",
            Self::Load => "load",
        }
    }
}

/// What a key asks of the loop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TopAction {
    /// Draw again.
    None,
    /// Read a sample now.
    Read,
    /// End.
    Quit,
}

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it is about.
    pub key: RowKey,
    /// Rates; none before the second sample.
    pub rates: Option<Rates>,
    /// Packets per second of the last samples, oldest first.
    pub history: Vec<u64>,
    /// Requests that the replicas run and queue, if they report.
    pub load: Option<(u64, u64)>,
    /// Text that the filter is compared with.
    pub text: String,
}

/// The state of the screen.
pub struct Top {
    page: Page,
    /// The last sample.
    pub sample: Option<TopSample>,
    /// Why the last attempt to read one failed.
    pub error: Option<String>,
    series: BTreeMap<RowKey, Series>,
    reasons: BTreeMap<String, Series>,
    /// Column that rows are sorted by.
    pub sort: Sort,
    /// Whether the order is reversed.
    pub reversed: bool,
    /// Text that rows must contain.
    pub filter: String,
    /// Whether keys go to the filter.
    pub is_editing: bool,
    /// Whether the keys are explained.
    pub is_help: bool,
    paused: bool,
    /// Number of the selected row.
    pub selected: usize,
    /// Rows that fit on the screen, as of the last drawing.
    pub height: usize,
}

impl Top {
    /// A screen without a sample.
    pub fn new(service: Option<Name>) -> Self {
        Self {
            page: service.map_or(Page::Services, Page::Backends),
            sample: None,
            error: None,
            series: BTreeMap::new(),
            reasons: BTreeMap::new(),
            sort: Sort::Packets,
            reversed: false,
            filter: String::new(),
            is_editing: false,
            is_help: false,
            paused: false,
            selected: 0,
            height: 10,
        }
    }

    /// The page that is shown.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Service whose backends are shown.
    pub fn service(&self) -> Option<&Name> {
        match &self.page {
            Page::Backends(service) => Some(service),
            Page::Services | Page::Reasons => None,
        }
    }

    /// Whether no samples are read.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Adds a sample.
    pub fn add(&mut self, sample: TopSample) {
        let mut present: Vec<RowKey> = Vec::new();
        for s in &sample.services {
            let (key, s) = ((s.name.to_string(), String::new()), &s.status);
            self.series.entry(key.clone()).or_default().add(sample.at, [s.flows, s.packets, s.bytes]);
            present.push(key);
        }
        // The counters of all backends, so that a service that is opened has rates at once.
        for b in &sample.stats.backends {
            let key = (b.service.to_string(), b.backend.to_string());
            self.series.entry(key.clone()).or_default().add(sample.at, [b.flows, b.packets, b.bytes]);
            present.push(key);
        }
        present.sort_unstable();
        self.series.retain(|key, _| present.binary_search(key).is_ok());
        for r in &sample.stats.reasons {
            self.reasons.entry(r.reason.clone()).or_default().add(sample.at, [0, r.packets, 0]);
        }
        self.error = None;
        self.sample = Some(sample);
        self.clamp();
    }

    /// Notes that no sample could be read.
    pub fn fail(&mut self, error: String) {
        self.error = Some(error);
    }

    fn row(&self, key: RowKey, load: Option<(u64, u64)>, text: String) -> Row {
        let series = self.series.get(&key);
        let history = series.map(|s| s.history.iter().copied().collect()).unwrap_or_default();
        Row { rates: series.and_then(|s| s.rates), history, key, load, text }
    }

    /// Running and waiting requests by service and backend.
    fn loads(&self) -> BTreeMap<RowKey, (u64, u64)> {
        let mut loads: BTreeMap<RowKey, (u64, u64)> = BTreeMap::new();
        for r in self.sample.iter().flat_map(|s| &s.replicas) {
            if r.state.readiness == Readiness::Lost {
                continue;
            }
            let Some(report) = &r.state.report else { continue };
            let service = r.service.to_string();
            for key in [(service.clone(), r.backend.to_string()), (service, String::new())] {
                let load = loads.entry(key).or_default();
                load.0 += u64::from(report.running);
                load.1 += u64::from(report.waiting);
            }
        }
        loads
    }

    /// The rows of the page, filtered and sorted.
    pub fn rows(&self) -> Vec<Row> {
        let Some(sample) = &self.sample else { return Vec::new() };
        let loads = self.loads();
        let mut rows: Vec<Row> = match &self.page {
            Page::Services => sample
                .services
                .iter()
                .map(|s| {
                    let key = (s.name.to_string(), String::new());
                    let text = format!("{} {}", s.name, s.spec.vip);
                    self.row(key.clone(), loads.get(&key).copied(), text)
                })
                .collect(),
            Page::Backends(service) => sample
                .backends
                .iter()
                .filter(|b| b.service == *service)
                .map(|b| {
                    let key = (b.service.to_string(), b.name.to_string());
                    let text = format!("{} {}", b.name, b.spec.address);
                    self.row(key.clone(), loads.get(&key).copied(), text)
                })
                .collect(),
            Page::Reasons => sample
                .stats
                .reasons
                .iter()
                .map(|r| {
                    let series = self.reasons.get(&r.reason);
                    Row {
                        key: (r.reason.clone(), r.fate.clone()),
                        rates: series.and_then(|s| s.rates),
                        history: series.map(|s| s.history.iter().copied().collect()).unwrap_or_default(),
                        load: None,
                        text: format!("{} {}", r.reason, r.fate),
                    }
                })
                .collect(),
        };
        let filter = self.filter.to_lowercase();
        rows.retain(|row| row.text.to_lowercase().contains(&filter));
        let rates = |row: &Row| row.rates.unwrap_or_default();
        // The largest first, and names from the start; equal ones by name.
        rows.sort_by(|a, b| {
            let order = match self.sort {
                Sort::Name => std::cmp::Ordering::Equal,
                Sort::Flows => rates(b).flows.total_cmp(&rates(a).flows),
                Sort::Packets => rates(b).packets.total_cmp(&rates(a).packets),
                Sort::Bytes => rates(b).bytes.total_cmp(&rates(a).bytes),
                Sort::Load => b.load.cmp(&a.load),
            };
            order.then_with(|| a.key.cmp(&b.key))
        });
        if self.reversed {
            rows.reverse();
        }
        rows
    }

    /// The reasons that drop packets now, with their rates, the fastest first.
    pub fn drops(&self) -> Vec<(String, f64)> {
        let Some(sample) = &self.sample else { return Vec::new() };
        let dropping = sample.stats.reasons.iter().filter(|r| r.fate == "drop").filter_map(|r| {
            let rate = self.reasons.get(&r.reason)?.rates?.packets;
            (rate > 0.0).then(|| (r.reason.clone(), rate))
        });
        let mut drops: Vec<_> = dropping.collect();
        drops.sort_by(|a, b| b.1.total_cmp(&a.1));
        drops
    }

    /// The sum of all services' rates; none before the second sample.
    pub fn total(&self) -> Option<Rates> {
        let all = self.sample.as_ref()?.services.iter();
        all.filter_map(|s| self.series.get(&(s.name.to_string(), String::new()))?.rates).reduce(|a, b| {
            Rates { flows: a.flows + b.flows, packets: a.packets + b.packets, bytes: a.bytes + b.bytes }
        })
    }

    fn clamp(&mut self) {
        self.selected = self.selected.min(self.rows().len().saturating_sub(1));
    }

    fn open(&mut self, page: Page) -> TopAction {
        self.page = page;
        (self.selected, self.filter) = (0, String::new());
        TopAction::Read
    }

    /// Handles a key.
    pub fn key(&mut self, key: KeyEvent) -> TopAction {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return TopAction::Quit;
        }
        if self.is_editing {
            match key.code {
                KeyCode::Enter => self.is_editing = false,
                KeyCode::Esc => (self.is_editing, self.filter) = (false, String::new()),
                KeyCode::Backspace => drop(self.filter.pop()),
                KeyCode::Char(c) if !c.is_control() && self.filter.len() < 64 => self.filter.push(c),
                _ => {}
            }
            self.clamp();
            return TopAction::None;
        }
        if std::mem::take(&mut self.is_help) && key.code != KeyCode::Char('q') {
            return TopAction::None;
        }
        let last = self.rows().len().saturating_sub(1);
        match key.code {
            KeyCode::Char('q') => return TopAction::Quit,
            KeyCode::Char('?' | 'h') => self.is_help = true,
            KeyCode::Char('/') => self.is_editing = true,
            KeyCode::Char('p' | ' ') => self.paused = !self.paused,
            KeyCode::Char('r') => self.reversed = !self.reversed,
            KeyCode::Char('s') => {
                let at = Sort::ALL.iter().position(|sort| *sort == self.sort).unwrap_or(0);
                self.sort = Sort::ALL[(at + 1) % Sort::ALL.len()];
            }
            KeyCode::Char('d') if self.page != Page::Reasons => return self.open(Page::Reasons),
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::Down | KeyCode::Char('j') => self.selected = (self.selected + 1).min(last),
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(self.height),
            KeyCode::PageDown => self.selected = (self.selected + self.height).min(last),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = last,
            KeyCode::Enter | KeyCode::Right if self.page == Page::Services => {
                let rows = self.rows();
                let name = rows.get(self.selected).and_then(|row| row.key.0.parse().ok());
                return name.map_or(TopAction::None, |name| self.open(Page::Backends(name)));
            }
            KeyCode::Esc if !self.filter.is_empty() => self.filter.clear(),
            KeyCode::Esc | KeyCode::Left | KeyCode::Backspace | KeyCode::Char('d')
                if self.page != Page::Services =>
            {
                return self.open(Page::Services);
            }
            _ => {}
        }
        TopAction::None
    }
}
