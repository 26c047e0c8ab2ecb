//! Part of [`Reader`] that reads and removes bindings of mode `nat`.

use super::{
    DataplaneError, batch,
    reader::{Reader, pinned, typed},
    sys,
};
use aya::maps::{HashMap, Map, MapData};
use lb_common::{FlowKey, Nat, Reply, ReplyKey, names};
use std::{path::Path, sync::OnceLock};

/// Handles of both maps.
pub struct Bindings {
    nats: (MapData, HashMap<MapData, FlowKey, Nat>),
    replies: (MapData, HashMap<MapData, ReplyKey, Reply>),
    /// Whether the kernel reports the memory of entries; determined at first use.
    reports_memory: OnceLock<bool>,
}

impl Bindings {
    /// Opens the pins.
    pub(super) fn open(pin_path: &Path) -> Result<Self, DataplaneError> {
        let typed_nats = typed(Map::HashMap(pinned(pin_path, names::NAT_FLOWS)?), names::NAT_FLOWS)?;
        let typed_replies = typed(Map::HashMap(pinned(pin_path, names::NAT_REPLIES)?), names::NAT_REPLIES)?;
        Ok(Self {
            nats: (pinned(pin_path, names::NAT_FLOWS)?, typed_nats),
            replies: (pinned(pin_path, names::NAT_REPLIES)?, typed_replies),
            reports_memory: OnceLock::new(),
        })
    }
}

impl Reader {
    /// Memory of both maps in bytes, if the kernel counts entries in it (Linux 6.4): equal memory means equally many.
    pub fn bindings_memory(&self) -> Option<[u64; 2]> {
        let Bindings { nats, replies, reports_memory } = &self.bindings;
        reports_memory.get_or_init(sys::counts_entry_memory).then_some(())?;
        Some([sys::memory(nats.0.fd())?, sys::memory(replies.0.fd())?])
    }

    /// Maximum number of bindings.
    pub fn bindings_room(&self) -> u32 {
        self.bindings.nats.0.info().map_or(u32::MAX, |info| info.max_entries())
    }

    /// Translation of a client's packets.
    pub fn nat(&self, key: &FlowKey) -> Option<Nat> {
        self.bindings.nats.1.get(key, 0).ok()
    }

    /// Translation of a worker's packets.
    pub fn reply(&self, key: &ReplyKey) -> Option<Reply> {
        self.bindings.replies.1.get(key, 0).ok()
    }

    /// Calls `each` with every client's entry.
    pub fn for_each_nat(&self, each: impl FnMut(FlowKey, Nat)) -> Result<(), DataplaneError> {
        batch::for_each(&self.bindings.nats.0, names::NAT_FLOWS, each)
    }

    /// Calls `each` with every worker's entry.
    pub fn for_each_reply(&self, each: impl FnMut(ReplyKey, Reply)) -> Result<(), DataplaneError> {
        batch::for_each(&self.bindings.replies.0, names::NAT_REPLIES, each)
    }

    /// Removes a client's entry.
    pub fn remove_nat(&self, key: &FlowKey) -> Result<(), DataplaneError> {
        batch::delete(&self.bindings.nats.0, key)
            .map_err(|source| DataplaneError::Read { map: names::NAT_FLOWS, source })
    }

    /// Removes a worker's entry.
    pub fn remove_reply(&self, key: &ReplyKey) -> Result<(), DataplaneError> {
        batch::delete(&self.bindings.replies.0, key)
            .map_err(|source| DataplaneError::Read { map: names::NAT_REPLIES, source })
    }
}
