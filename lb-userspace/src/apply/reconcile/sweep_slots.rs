//! Slots of the flows that a sweep of `FLOWS` finds: which slots have none, and which flows need no entry any more.
//!
//! A flow's slot follows from its key and the service's VIP, as in the packet code. Used by the sweeper only.

use crate::apply::dataplane::{DataplaneError, Reader};
use lb_common::{Address, Flow, FlowKey, ServiceView, Slot, service::flags};
use lb_ebpf::select::scheduler::{is_at_home, number_of};
use std::collections::{BTreeMap, HashMap};

/// What determines the slot of a flow: seed, number of slots, and whether only the client's address is hashed.
pub type SlotHashing = ([u64; 2], u32, bool);

/// Slots of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotSet {
    /// Hashing by which flows are assigned to slots.
    pub hashing: SlotHashing,
    /// A bit for each slot.
    pub bits: Vec<u64>,
}

impl SlotSet {
    fn new(hashing: SlotHashing) -> Self {
        Self { hashing, bits: vec![0; hashing.1.div_ceil(64) as usize] }
    }

    /// Adds a slot, which belongs to the table.
    fn add(&mut self, number: u32) {
        self.bits[number as usize / 64] |= 1 << (number % 64);
    }
}

fn hashing(view: &ServiceView) -> SlotHashing {
    (view.seed, view.slot_count, view.flags & flags::HASH_SOURCE != 0)
}

/// Slots of flows, while a sweep walks `FLOWS`.
pub struct FlowSlots<'a> {
    reader: &'a Reader,
    /// VIP of each service.
    vips: HashMap<u32, Address>,
    /// Slots with flows, by service; none for a service whose hashing changed during the sweep.
    slots: BTreeMap<u32, Option<SlotSet>>,
}

impl<'a> FlowSlots<'a> {
    /// Reads the services' VIPs.
    pub fn new(reader: &'a Reader) -> Result<Self, DataplaneError> {
        let mut vips: HashMap<u32, Address> = HashMap::new();
        for (key, vip) in reader.vips()? {
            let ranges = vip.ranges.iter().take(vip.range_count as usize).map(|range| range.service);
            vips.extend(ranges.chain([vip.any_tcp, vip.any_udp]).map(|service| (service, key.vip)));
        }
        vips.extend(reader.service_keys()?.into_iter().map(|(key, service)| (service, key.vip)));
        Ok(Self { reader, vips, slots: BTreeMap::new() })
    }

    fn view(&self, service: u32) -> Option<ServiceView> {
        let entry = self.reader.service(service).filter(|entry| entry.used != 0)?;
        Some(entry.views[(entry.active & 1) as usize])
    }

    /// Number of a flow's slot.
    fn number(&self, view: &ServiceView, key: &FlowKey) -> Option<u32> {
        if view.slot_count == 0 {
            return None;
        }
        let vip = self.vips.get(&key.service)?;
        Some(number_of(view, key, vip))
    }

    /// Notes that a flow has an entry.
    pub fn add(&mut self, key: &FlowKey) {
        let found = self.view(key.service).and_then(|view| Some((hashing(&view), self.number(&view, key)?)));
        let Some((hashing, number)) = found else {
            self.slots.insert(key.service, None);
            return;
        };
        let slots = self.slots.entry(key.service).or_insert_with(|| Some(SlotSet::new(hashing)));
        match slots {
            Some(set) if set.hashing == hashing => set.add(number),
            _ => *slots = None,
        }
    }

    /// Whether a packet of this flow would be sent to the same backend without an entry.
    pub fn is_redundant(&self, key: &FlowKey, flow: &Flow) -> bool {
        let Some(view) = self.view(key.service) else { return false };
        let slot = self.number(&view, key).and_then(|number| {
            let slot: Slot = self.reader.slot(view.slot_base.wrapping_add(number))?;
            // The table was the service's when the slot was read: its region is not reused while it is.
            let now = self.view(key.service)?;
            (now.slot_base == view.slot_base && hashing(&now) == hashing(&view)).then_some((now, slot))
        });
        slot.is_some_and(|(view, slot)| is_at_home(&view, slot, flow.backend))
    }

    /// Slots with flows, by service.
    pub fn into_slots(self) -> BTreeMap<u32, SlotSet> {
        self.slots.into_iter().filter_map(|(service, slots)| Some((service, slots?))).collect()
    }
}
