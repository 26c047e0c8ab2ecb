//! State that must outlive the daemon, beside the desired state: saved after each change.
//!
//! A change concerns a few services among thousands, so the JSON of each service is cached and made again only when its
//! memory changes: with 4,096 services of 10 backends the whole is megabytes.

use crate::{
    desired::model::Name,
    plan::compile::{Memory, ServiceId, ServiceMemory},
};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, sync::Arc};

/// State that must outlive the daemon, beside the desired state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Boot id that the clock of `memory` belongs to.
    pub boot_id: String,
    /// Indices of services and backends, and the recent history of the tables.
    pub memory: Memory,
    /// See [`Published::retired_stats`].
    pub retired_stats: BTreeMap<Name, [u64; 3]>,
}

/// Stores [`Kept`]: called with its JSON after each change.
pub type Keep = Box<dyn Fn(Vec<u8>) + Send>;

/// Returns the id of the current boot, from which the clock counts.
pub(super) fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|s| s.trim().to_owned())
        .unwrap_or_default()
}

/// Memory of a service, and its JSON entry in the list of services.
struct SavedService {
    memory: Arc<ServiceMemory>,
    json: Vec<u8>,
}

/// Saves [`Kept`] incrementally.
pub(super) struct Keeper {
    keep: Keep,
    parts: BTreeMap<ServiceId, SavedService>,
    last: Vec<u8>,
}

impl Keeper {
    pub(super) fn new(keep: Keep) -> Self {
        Self { keep, parts: BTreeMap::new(), last: Vec::new() }
    }

    /// Saves the state, if it has changed.
    pub(super) fn keep(&mut self, memory: &Memory, retired_stats: &BTreeMap<Name, [u64; 3]>) {
        self.parts.retain(|id, _| memory.services.contains_key(id));
        for (id, service) in &memory.services {
            if self.parts.get(id).is_none_or(|part| !Arc::ptr_eq(&part.memory, service)) {
                let part = SavedService { memory: Arc::clone(service), json: json(&(id, &**service)) };
                self.parts.insert(*id, part);
            }
        }
        let mut bytes = Vec::with_capacity(self.last.len() + 4_096);
        bytes.extend_from_slice(br#"{"boot_id":"#);
        bytes.extend(json(&boot_id()));
        bytes.extend_from_slice(br#","memory":{"services":["#);
        for (i, part) in self.parts.values().enumerate() {
            bytes.extend_from_slice(if i == 0 { b"" } else { b"," });
            bytes.extend_from_slice(&part.json);
        }
        bytes.extend_from_slice(br#"],"retired":"#);
        bytes.extend(json(&memory.retired));
        bytes.extend_from_slice(br#"},"retired_stats":"#);
        bytes.extend(json(retired_stats));
        bytes.push(b'}');
        if bytes != self.last {
            (self.keep)(bytes.clone());
            self.last = bytes;
        }
    }
}

fn json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("the keys of its maps are valid in JSON")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn what_is_written_in_parts_is_what_serde_writes() {
        let written = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&written);
        let mut keeper = Keeper::new(Box::new(move |bytes| keep.lock().unwrap().push(bytes)));
        let id = |port| ServiceId {
            vip: "10.0.0.1".parse().unwrap(),
            port: crate::desired::model::Ports::One(port),
            protocol: crate::desired::model::Protocol::Tcp,
        };
        let mut kept = Kept { boot_id: boot_id(), ..Kept::default() };
        for port in 0..3u16 {
            keeper.keep(&kept.memory, &kept.retired_stats);
            keeper.keep(&kept.memory, &kept.retired_stats);
            assert_eq!(written.lock().unwrap().len(), usize::from(port) + 1, "once for each change");
            assert_eq!(written.lock().unwrap().last().unwrap(), &serde_json::to_vec(&kept).unwrap());
            kept.memory
                .services
                .insert(id(port), Arc::new(ServiceMemory { index: port.into(), ..Default::default() }));
            kept.retired_stats.insert("web".parse().unwrap(), [port.into(); 3]);
        }
    }
}
