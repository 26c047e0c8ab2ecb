//! This host through the API: the VIPs that it announces, and taking it out of service.
//!
//! Input: requests, and what the announcer shows. Output: JSON of [`HostInfo`]. A drain takes the VIPs off and
//! changes nothing else: what still comes is forwarded, and the host is quiet when routers have learnt of it.
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
/// How often a draining host looks whether packets still come.
const LOOK: Duration = Duration::from_millis(500);
/// How long a drain waits for the VIPs to be off before it answers.
const TAKEN_OFF: Duration = Duration::from_secs(5);

/// This host is out of service, by somebody's word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDrain {
    /// Whose.
    pub author: String,
    /// What for.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// Since when, in milliseconds since 1970 UTC.
    pub since_ms: u64,
}

/// Body of `POST /v1/host/drain`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// What for.
    #[serde(default)]
    pub reason: String,
}

/// `GET /v1/host`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Name.
    pub host: String,
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// What it announces; none if lbd was started without `announce`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub announcement: Option<Announcement>,
    /// Its drain, if it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<HostDrain>,
    /// While it drains: packets forwarded per second, at the last look.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_per_s: Option<u64>,
    /// While it drains: how long no packet has come, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quiet_ms: Option<u64>,
}

/// What a draining host still forwards.
#[derive(Clone, Copy, Debug)]
struct Traffic {
    packets: u64,
    packets_per_s: u64,
    at_ms: u64,
    last_ms: u64,
}

/// What the daemon knows of this host's announcement.
pub struct HostState {
    announcement: Option<watch::Receiver<Announcement>>,
    drain: watch::Sender<Option<HostDrain>>,
    is_draining: watch::Sender<bool>,
    traffic: Mutex<Option<Traffic>>,
    local: Arc<dyn Local>,
}

impl HostState {
    /// With the drain that was in force when lbd last stopped.
    ///
    /// # Errors
    /// It cannot be read.
    pub async fn restore(
        local: Arc<dyn Local>,
        announcement: Option<watch::Receiver<Announcement>>,
    ) -> Result<Arc<Self>, StoreError> {
        let saved = local.load(DRAIN).await?;
        let drain: Option<HostDrain> = saved.and_then(|bytes| match serde_json::from_slice(&bytes) {
            Ok(drain) => drain,
            Err(error) => {
                tracing::warn!(%error, "whether this host drains cannot be read: it does not");
                None
            }
        });
        if let Some(HostDrain { author, reason, .. }) = &drain {
            tracing::warn!(author, reason, "this host drains: `lbctl host undrain` ends that");
        }
        let is_draining = watch::Sender::new(drain.is_some());
        let drain = watch::Sender::new(drain);
        Ok(Arc::new(Self { announcement, drain, is_draining, traffic: Mutex::new(None), local }))
    }

    /// Whether this host drains, watched.
    pub fn is_draining(&self) -> watch::Receiver<bool> {
        self.is_draining.subscribe()
    }

    /// What is announced, watched; none if nothing ever is.
    pub fn announcement(&self) -> Option<watch::Receiver<Announcement>> {
        self.announcement.clone()
    }

    async fn set(&self, drain: Option<HostDrain>) -> Result<(), StoreError> {
        let bytes = serde_json::to_vec(&drain).expect("texts and numbers have a JSON form");
        self.local.save(DRAIN, bytes).await?;
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.is_draining.send_replace(drain.is_some());
        self.drain.send_replace(drain);
        Ok(())
    }
}

impl Control {
    /// Says what is known of this host's announcement.
    pub fn announce(&self, hosting: Arc<HostState>) {
        // Said once, by the daemon.
        let _ = self.hosting.set(hosting);
    }

    /// What this host announces; none if nothing ever.
    pub fn announcement(&self) -> Option<Announcement> {
        Some(self.hosting.get()?.announcement.as_ref()?.borrow().clone())
    }

    /// The same, watched.
    pub fn announcement_watch(&self) -> Option<watch::Receiver<Announcement>> {
        self.hosting.get()?.announcement()
    }

    /// This host's drain, if it drains.
    pub fn host_drain(&self) -> Option<HostDrain> {
        self.hosting.get().and_then(|h| h.drain.borrow().clone())
    }

    /// `GET /v1/host`.
    pub fn host_info(&self) -> HostInfo {
        let mut info =
            HostInfo { announcement: self.announcement(), drain: self.host_drain(), ..HostInfo::default() };
        if let Some(sharing) = self.sharing.get() {
            (info.host, info.region, info.zone) =
                (sharing.host.clone(), sharing.region.clone(), sharing.zone.clone());
        }
        let traffic =
            self.hosting.get().and_then(|h| *h.traffic.lock().unwrap_or_else(PoisonError::into_inner));
        if let (Some(traffic), Some(_)) = (traffic, &info.drain) {
            info.packets_per_s = Some(traffic.packets_per_s);
            info.quiet_ms = Some(clock::unix_ms().saturating_sub(traffic.last_ms));
        }
        info
    }

    /// While this host drains, looks what it still forwards.
    pub async fn follow_drain(self: Arc<Self>) {
        let Some(hosting) = self.hosting.get().cloned() else { return std::future::pending().await };
        let mut draining = hosting.is_draining();
        loop {
            if draining.wait_for(|is| *is).await.is_err() {
                return;
            }
            if let Ok(counters) = self.reading(|engine| engine.counters()).await {
                let packets = counters.services.values().map(|s| s.packets).sum();
                let mut last = hosting.traffic.lock().unwrap_or_else(PoisonError::into_inner);
                *last = Some(looked(*last, packets, clock::unix_ms()));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// One more look at the sum of forwarded packets.
fn looked(last: Option<Traffic>, packets: u64, now_ms: u64) -> Traffic {
    let Some(last) = last else {
        return Traffic { packets, packets_per_s: 0, at_ms: now_ms, last_ms: now_ms };
    };
    let more = packets.saturating_sub(last.packets);
    let packets_per_s = (more * 1_000).checked_div(now_ms.saturating_sub(last.at_ms)).unwrap_or(0);
    let last_ms = if packets == last.packets { last.last_ms } else { now_ms };
    Traffic { packets, packets_per_s, at_ms: now_ms, last_ms }
}

pub(super) async fn show(State(control): State<Arc<Control>>) -> Reply<HostInfo> {
    Ok(Json(control.host_info()))
}

fn announcing(control: &Control) -> Result<&Arc<HostState>, ApiError> {
    control.hosting.get().filter(|h| h.announcement.is_some()).ok_or_else(|| ApiError {
        status: StatusCode::CONFLICT,
        code: "not_announcing",
        ..ApiError::bad_request("this host announces no VIPs, so there is nothing to take off")
            .fix("start lbd with --announce IFACE; or take its routes away where they are announced")
    })
}

pub(super) async fn drain(
    State(control): State<Arc<Control>>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<HostInfo> {
    let DrainRequest { reason } = if bytes.is_empty() { DrainRequest::default() } else { body(&bytes)? };
    let hosting = announcing(&control)?;
    if control.host_drain().is_none() {
        let author = author.name;
        tracing::warn!(author, reason, "this host drains: its VIPs go off");
        hosting.set(Some(HostDrain { author, reason, since_ms: clock::unix_ms() })).await?;
    }
    if let Some(mut announcement) = hosting.announcement() {
        // An address that is not ours stays, and is told of; so is one that cannot be taken off.
        let is_off =
            |a: &Announcement| a.problem.is_some() || a.vips.iter().all(|v| !v.on || v.foreign.is_some());
        let _ = tokio::time::timeout(TAKEN_OFF, announcement.wait_for(is_off)).await;
    }
    Ok(Json(control.host_info()))
}

pub(super) async fn undrain(State(control): State<Arc<Control>>, Writer(author): Writer) -> Reply<HostInfo> {
    let hosting = announcing(&control)?;
    if control.host_drain().is_some() {
        tracing::info!(author = author.name, "this host is back in service");
        hosting.set(None).await?;
    }
    Ok(Json(control.host_info()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_quiet_since_the_last_look_that_found_more_packets() {
        let first = looked(None, 100, 1_000);
        let second = looked(Some(first), 150, 1_500);
        assert_eq!((second.packets_per_s, second.last_ms), (100, 1_500));
        let third = looked(Some(second), 150, 2_000);
        assert_eq!((third.packets_per_s, third.last_ms), (0, 1_500));
    }
}
