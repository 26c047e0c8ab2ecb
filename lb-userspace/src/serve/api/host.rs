//! API of this host: the VIPs that it announces, and draining it.
//!
//! Input: requests, and the announcer's state. Output: JSON of [`HostInfo`]. A drain removes the VIPs and
//! changes nothing else: packets that still arrive are forwarded, until the routers have withdrawn the host.
//! Called by `routes`; set up by the daemon.

use super::{
    ApiError, Control,
    access::Writer,
    routes::{Reply, body},
};
use crate::{
    apply::announce::Announcement,
    clock,
    desired::store::{Local, StoreError},
    printable,
};
use axum::{Json, body::Bytes, extract::State, http::StatusCode};
use serde::{Deserialize, Serialize};
use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::sync::watch;

/// Key of the drain in the local store.
const DRAIN: &str = "host-drain";
/// How often a draining host samples its packet counters.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a drain request waits for the VIPs to be removed.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The drain of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDrain {
    /// Who asked for the drain.
    pub author: String,
    /// Why.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Start of the drain, in milliseconds since 1970 UTC.
    pub since_ms: u64,
}

/// Body of `POST /v1/host/drain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Why.
    #[serde(default, deserialize_with = "printable::reason")]
    pub reason: String,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Name of this host.
    pub host: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// What this host announces; none if lbd was started without `announce`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announcement: Option<Announcement>,
    /// The host's drain, if it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<HostDrain>,
    /// During a drain: packets forwarded per second, at the last sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_per_s: Option<u64>,
    /// During a drain: time without a packet, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiet_ms: Option<u64>,
}

/// A sample of what a draining host still forwards.
#[derive(Clone, Copy, Debug)]
struct Traffic {
    packets: u64,
    packets_per_s: u64,
    at_ms: u64,
    last_ms: u64,
}

/// This host's announcement and drain.
pub struct HostState {
    announcement: Option<watch::Receiver<Announcement>>,
    drain: watch::Sender<Option<HostDrain>>,
    is_draining: watch::Sender<bool>,
    traffic: Mutex<Option<Traffic>>,
    local: Arc<dyn Local>,
}

impl HostState {
    /// Reads the drain that was in effect when lbd last stopped.
    ///
    /// # Errors
    /// The local store cannot be read.
    pub async fn restore(
        local: Arc<dyn Local>,
        announcement: Option<watch::Receiver<Announcement>>,
    ) -> Result<Arc<Self>, StoreError> {
        let saved = local.load(DRAIN).await?;
        let drain: Option<HostDrain> = saved.and_then(|bytes| match serde_json::from_slice(&bytes) {
            Ok(drain) => drain,
            Err(error) => {
                tracing::warn!(%error, "cannot read whether this host drains: assuming that it does not");
                None
            }
        });
        if let Some(HostDrain { author, reason, .. }) = &drain {
            tracing::warn!(author, reason, "this host drains: `lbctl host undrain` ends the drain");
        }
        let is_draining = watch::Sender::new(drain.is_some());
        let drain = watch::Sender::new(drain);
        Ok(Arc::new(Self { announcement, drain, is_draining, traffic: Mutex::new(None), local }))
    }

    /// Watches whether this host drains.
    pub fn is_draining(&self) -> watch::Receiver<bool> {
        self.is_draining.subscribe()
    }

    /// Watches the announcement; none if lbd does not announce.
    pub fn announcement(&self) -> Option<watch::Receiver<Announcement>> {
        self.announcement.clone()
    }

    async fn set_drain(&self, drain: Option<HostDrain>) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(&drain).expect("texts and numbers have a JSON form");
        self.local.save(DRAIN, bytes).await?;
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.is_draining.send_replace(drain.is_some());
        self.drain.send_replace(drain);
        Ok(())
    }
}

impl Control {
    /// Sets this host's announcement and drain. The daemon calls it once.
    pub fn set_host_state(&self, host_state: Arc<HostState>) {
        let _ = self.host_state.set(host_state);
    }

    /// What this host announces; none if lbd does not announce.
    pub fn announcement(&self) -> Option<Announcement> {
        Some(self.host_state.get()?.announcement.as_ref()?.borrow().clone())
    }

    /// Watches what this host announces; none if lbd does not announce.
    pub fn announcement_watch(&self) -> Option<watch::Receiver<Announcement>> {
        self.host_state.get()?.announcement()
    }

    /// This host's drain, if it drains.
    pub fn host_drain(&self) -> Option<HostDrain> {
        self.host_state.get().and_then(|h| h.drain.borrow().clone())
    }

    /// `GET /v1/host`.
    pub fn host_info(&self) -> HostInfo {
        let mut info =
            HostInfo { announcement: self.announcement(), drain: self.host_drain(), ..HostInfo::default() };
        if let Some(sharing) = self.fleet_member.get() {
            (info.host, info.region, info.zone) =
                (sharing.host.clone(), sharing.region.clone(), sharing.zone.clone());
        }
        let traffic =
            self.host_state.get().and_then(|h| *h.traffic.lock().unwrap_or_else(PoisonError::into_inner));
        if let (Some(traffic), Some(_)) = (traffic, &info.drain) {
            info.packets_per_s = Some(traffic.packets_per_s);
            info.quiet_ms = Some(clock::unix_ms().saturating_sub(traffic.last_ms));
        }
        info
    }

    /// While this host drains, samples what it still forwards.
    pub async fn run_drain_sampler(self: Arc<Self>) {
        let Some(host_state) = self.host_state.get().cloned() else { return std::future::pending().await };
        let mut draining = host_state.is_draining();
        loop {
            if draining.wait_for(|is| *is).await.is_err() {
                return;
            }
            if let Ok(counters) = self.read_engine(|engine| engine.counters()).await {
                let packets = counters.services.values().map(|s| s.packets).sum();
                let mut last = host_state.traffic.lock().unwrap_or_else(PoisonError::into_inner);
                *last = Some(next_sample(*last, packets, clock::unix_ms()));
            }
            tokio::time::sleep(SAMPLE_INTERVAL).await;
        }
    }
}

/// Computes the next sample from the sum of forwarded packets.
fn next_sample(last: Option<Traffic>, packets: u64, now_ms: u64) -> Traffic {
    let Some(last) = last else {
        return Traffic { packets, packets_per_s: 0, at_ms: now_ms, last_ms: now_ms };
    };
    let new = packets.saturating_sub(last.packets);
    let packets_per_s = (new * 1_000).checked_div(now_ms.saturating_sub(last.at_ms)).unwrap_or(0);
    let last_ms = if packets == last.packets { last.last_ms } else { now_ms };
    Traffic { packets, packets_per_s, at_ms: now_ms, last_ms }
}

pub(super) async fn show(State(control): State<Arc<Control>>) -> Reply<HostInfo> {
    Ok(Json(control.host_info()))
}

fn require_announcing(control: &Control) -> Result<&Arc<HostState>, ApiError> {
    control.host_state.get().filter(|h| h.announcement.is_some()).ok_or_else(|| ApiError {
        status: StatusCode::CONFLICT,
        code: "not_announcing",
        ..ApiError::bad_request("this host announces no VIPs, so there is nothing to drain")
            .fix("start lbd with --announce IFACE, or withdraw the host's routes where they are announced")
    })
}

pub(super) async fn drain(
    State(control): State<Arc<Control>>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<HostInfo> {
    let DrainRequest { reason } = if bytes.is_empty() { DrainRequest::default() } else { body(&bytes)? };
    let host_state = require_announcing(&control)?;
    if control.host_drain().is_none() {
        let author = author.name;
        host_state.set_drain(Some(HostDrain { author, reason, since_ms: clock::unix_ms() })).await?;
    }
    if let Some(mut announcement) = host_state.announcement() {
        // A foreign VIP is not removed; a VIP that cannot be removed is a problem. The answer reports both.
        let is_off =
            |a: &Announcement| a.problem.is_some() || a.vips.iter().all(|v| !v.on || v.foreign.is_some());
        let _ = tokio::time::timeout(REMOVAL_TIMEOUT, announcement.wait_for(is_off)).await;
    }
    Ok(Json(control.host_info()))
}

pub(super) async fn undrain(State(control): State<Arc<Control>>, Writer(author): Writer) -> Reply<HostInfo> {
    let host_state = require_announcing(&control)?;
    if control.host_drain().is_some() {
        tracing::info!(author = author.name, "the host's drain was ended");
        host_state.set_drain(None).await?;
    }
    Ok(Json(control.host_info()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_quiet_since_the_last_sample_with_more_packets() {
        let first = next_sample(None, 100, 1_000);
        let second = next_sample(Some(first), 150, 1_500);
        assert_eq!((second.packets_per_s, second.last_ms), (100, 1_500));
        let third = next_sample(Some(second), 150, 2_000);
        assert_eq!((third.packets_per_s, third.last_ms), (0, 1_500));
    }
}
