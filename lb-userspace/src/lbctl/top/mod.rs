//! `lbctl top`: services and backends with their rates, on a screen that is drawn again and again.
//!
//! Input: status, services, backends and counters of the API; keys. Output: the screen. [`model`] keeps the samples and
//! computes rates, [`view`] draws; this module reads lbd, reads keys, and leaves the terminal as it was, whatever ends it.

mod model;
#[cfg(test)]
mod tests;
mod view;

use super::commands::Failure;
use crate::{
    desired::model::Name,
    lbctl::client::ApiClient,
    serve::api::types::{BackendInfo, Replicas, ServiceInfo, Stats, Status},
};
use model::{Top, TopAction, TopSample};
use ratatui::{
    Terminal,
    backend::TestBackend,
    crossterm::event::{self, Event, KeyEventKind},
};
use std::{
    io,
    time::{Duration, Instant},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
};

/// Height of the text of `--once` without its rows, and at most.
const ONCE_HEIGHT: u16 = 24;
const ONCE_MOST: u16 = 10_000;
/// Time for which the thread that reads keys waits for one.
const KEY_WAIT: Duration = Duration::from_millis(100);

/// What to show.
#[derive(Clone, Debug)]
pub struct TopOptions {
    /// Time between two samples.
    pub interval: Duration,
    /// Service whose backends are shown first.
    pub service: Option<Name>,
}

/// Reads one sample.
async fn sample(client: &ApiClient, service: Option<&Name>) -> Result<TopSample, Failure> {
    let status: Status = client.get("/v1/status", &()).await?;
    let services: Vec<ServiceInfo> = client.get("/v1/services", &()).await?;
    let stats: Stats = client.get("/v1/stats", &()).await?;
    let backends: Vec<BackendInfo> = match service {
        Some(service) => client.get(&format!("/v1/services/{service}/backends"), &()).await?,
        None => Vec::new(),
    };
    let replicas = if services.iter().any(|s| s.spec.replica.is_some()) {
        client.get::<Replicas>("/v1/replicas", &()).await?.replicas
    } else {
        Vec::new()
    };
    Ok(TopSample { at: Instant::now(), status, services, backends, stats, replicas })
}

/// Prints one screen as text, with rates over one interval.
///
/// # Errors
/// lbd cannot be reached, or refused.
pub async fn once(client: &ApiClient, options: &TopOptions, width: u16) -> Result<String, Failure> {
    let mut top = Top::new(options.service.clone());
    top.add(sample(client, top.service()).await?);
    tokio::time::sleep(options.interval).await;
    top.add(sample(client, top.service()).await?);
    // As high as needed for all rows; empty lines are left out.
    let rows = u16::try_from(top.rows().len()).unwrap_or(u16::MAX);
    let screen = TestBackend::new(width, ONCE_HEIGHT.saturating_add(rows).min(ONCE_MOST));
    let mut terminal = Terminal::new(screen).map_err(|e| Failure::Internal(e.to_string()))?;
    let drawn = terminal.draw(|frame| view::draw(frame, &mut top));
    drawn.map_err(|e| Failure::Internal(e.to_string()))?;
    let text = view::text(terminal.backend().buffer());
    Ok(text.lines().filter(|line| !line.is_empty()).flat_map(|line| [line, "\n"]).collect())
}

/// Restores the terminal when dropped, also by a panic.
struct Restored;

impl Drop for Restored {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Shows the screen until a key or a signal ends it.
///
/// # Errors
/// lbd cannot be reached at the start, or the terminal failed.
pub async fn run(client: &ApiClient, options: &TopOptions) -> Result<(), Failure> {
    let mut top = Top::new(options.service.clone());
    // Before the screen is taken: an error at the start is an ordinary message.
    top.add(sample(client, top.service()).await?);
    let mut signals = [SignalKind::terminate(), SignalKind::hangup(), SignalKind::interrupt()]
        .into_iter()
        .map(signal)
        .collect::<io::Result<Vec<_>>>()?;
    let mut terminal = ratatui::try_init()?;
    let _restored = Restored;
    let mut keys = read_keys();
    let mut next = tokio::time::Instant::now() + options.interval;
    let mut is_due = false;
    loop {
        terminal.draw(|frame| view::draw(frame, &mut top))?;
        if is_due {
            is_due = false;
            match sample(client, top.service()).await {
                Ok(sample) => top.add(sample),
                // lbd may be restarting: the last figures stay, with the error beside them.
                Err(failure) => top.fail(failure.to_string()),
            }
            continue;
        }
        let [terminate, hangup, interrupt] = &mut signals[..] else { return Ok(()) };
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = hangup.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = tokio::time::sleep_until(next) => {
                next = tokio::time::Instant::now() + options.interval;
                is_due = !top.is_paused();
            }
            event = keys.recv() => match event {
                Some(Event::Key(key)) if key.kind != KeyEventKind::Release => match top.key(key) {
                    TopAction::None => {}
                    TopAction::Read => is_due = true,
                    TopAction::Quit => return Ok(()),
                },
                // A new size: the next drawing takes it.
                Some(_) => {}
                None => return Ok(()),
            }
        }
    }
}

/// Reads keys on a thread of its own, until nobody wants them.
fn read_keys() -> mpsc::Receiver<Event> {
    let (sender, receiver) = mpsc::channel(64);
    std::thread::spawn(move || {
        while !sender.is_closed() {
            match event::poll(KEY_WAIT) {
                Ok(false) => continue,
                Ok(true) => {}
                Err(_) => return,
            }
            let Ok(event) = event::read() else { return };
            if sender.blocking_send(event).is_err() {
                return;
            }
        }
    });
    receiver
}
