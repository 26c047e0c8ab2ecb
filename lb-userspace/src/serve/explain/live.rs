//! Read-only access to the live maps for one query: implements the packet code's table traits.

use super::{BackendView, Names, to_ip};
use crate::apply::dataplane::Reader;
use lb_common::{
    Backend, Flow, FlowKey, Reason, ServiceKey, ServiceView, Vip, VipKey, backend,
    guard::{GuardKey, GuardState},
    quic::{QuicConfig, ServerIdKey},
    slot::NO_BACKEND,
};
use lb_ebpf::{
    FlowTable, Tables,
    guard::GuardTables,
    quic::{QuicTables, Work},
};
use std::cell::{Cell, OnceCell, RefCell};

/// The maps, and a cache of the entries that the query has read.
pub(super) struct MapReader<'a> {
    pub(super) reader: &'a Reader,
    vip: OnceCell<Option<Vip>>,
    view: OnceCell<Option<ServiceView>>,
    guard: OnceCell<Option<GuardState>>,
    /// Backends read so far: a slot's pair, and those that flow tables name.
    backends: [OnceCell<(u32, Backend)>; 8],
    /// Whether the packet code would have recorded a flow.
    pub(super) recorded: Cell<bool>,
    quic: OnceCell<Option<QuicConfig>>,
    /// Scratch space of the connection id parser, which keeps the decoded server id.
    pub(super) work: RefCell<Work>,
}

impl<'a> MapReader<'a> {
    pub(super) fn new(reader: &'a Reader) -> Self {
        Self {
            reader,
            vip: OnceCell::new(),
            view: OnceCell::new(),
            guard: OnceCell::new(),
            backends: Default::default(),
            recorded: Cell::new(false),
            quic: OnceCell::new(),
            work: RefCell::default(),
        }
    }

    pub(super) fn backend_view(&self, names: &impl Names, index: u32) -> Option<BackendView> {
        if index == NO_BACKEND {
            return None;
        }
        let entry = self.backend(index)?;
        let f = entry.flags;
        let state = match () {
            () if f & backend::flags::USED == 0 => "removed",
            () if f & backend::flags::DOWN != 0 => "down",
            () if f & backend::flags::DRAINING != 0 => "draining",
            () => "up",
        };
        Some(BackendView {
            index,
            name: names.backend(index),
            address: to_ip(entry.address),
            state: state.to_owned(),
        })
    }
}

impl GuardTables for MapReader<'_> {
    fn guard_block(&self, word: u32) -> u32 {
        self.reader.guard_word(true, word)
    }

    fn guard_filter(&self, word: u32) -> u32 {
        self.reader.guard_word(false, word)
    }

    fn guard_state(&self) -> Option<&GuardState> {
        self.guard.get_or_init(|| self.reader.guard_state()).as_ref()
    }

    fn guard_entry(&self, key: &GuardKey) -> Option<u32> {
        self.reader.guard_entry(key)
    }
}

impl Tables for MapReader<'_> {
    fn is_denied(&self, source: [u32; 4]) -> bool {
        lb_ebpf::guard::is_denied(self, source)
    }

    fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        self.reader.service_index(key)
    }

    fn vip(&self, key: &VipKey) -> Option<&Vip> {
        self.vip.get_or_init(|| self.reader.vip(key)).as_ref()
    }

    fn is_worker(&self, address: [u32; 4]) -> bool {
        self.reader.has_worker(&zerocopy::transmute!(address))
    }

    fn is_vip(&self, vip: [u64; 2]) -> bool {
        // Not cached: the source address is looked up too.
        self.reader.vip(&VipKey { vip: zerocopy::transmute!(vip) }).is_some()
    }

    fn service(&self, index: u32) -> Option<&ServiceView> {
        let live = || self.reader.service(index).map(|s| s.views[(s.active & 1) as usize]);
        self.view.get_or_init(live).as_ref()
    }

    fn primary(&self, place: u32) -> Option<u32> {
        self.reader.slot(place).map(|slot| slot.primary)
    }

    fn secondary(&self, place: u32) -> Option<u32> {
        self.reader.slot(place).map(|slot| slot.secondary)
    }

    fn backend(&self, index: u32) -> Option<&Backend> {
        for cell in &self.backends {
            match cell.get() {
                Some((i, entry)) if *i == index => return Some(entry),
                Some(_) => {}
                None => {
                    return self.reader.backend(index).map(|entry| &cell.get_or_init(|| (index, entry)).1);
                }
            }
        }
        None
    }

    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        let flow = self.reader.flow(table, key)?;
        // A query has no sequence number; assume one that continues the SYN's and the handshake's.
        let flags = flow.flags & !lb_common::flow::flags::HANDSHAKE;
        Some(Flow { created_s: if table == FlowTable::Syns { 0 } else { flow.created_s }, flags, ..flow })
    }

    fn record(&self, _: FlowTable, _: &FlowKey, _: &Flow) -> bool {
        self.recorded.set(true);
        true
    }

    fn touch(&self, _: FlowTable, _: &FlowKey, _: u32, _: u32) {}

    fn forget(&self, _: FlowTable, _: &FlowKey) {}

    fn load(&self, backend: u32, now_s: u32) -> u32 {
        self.reader.load(backend).map_or(0, |l| lb_common::load::total(l.report, l.added, now_s))
    }

    fn charge(&self, _: u32, _: u32) {}

    fn next_turn(&self, _: u32) -> u64 {
        0
    }

    fn random(&self) -> u32 {
        0
    }

    fn now_s(&self) -> u32 {
        crate::clock::boot_s()
    }

    fn count(&self, _: Reason) {}

    fn account(&self, _: u32, _: u32, _: bool) {}

    fn take_icmp(&self, _: u32, _: u32) -> bool {
        false
    }
}

impl QuicTables for MapReader<'_> {
    fn quic_config(&self, key: u32) -> Option<&QuicConfig> {
        self.quic.get_or_init(|| self.reader.quic_config(key)).as_ref()
    }

    fn quic_server(&self, key: &ServerIdKey) -> Option<u32> {
        self.reader.quic_server(key)
    }

    fn with_work<R>(&self, f: impl FnOnce(&mut Work) -> R) -> Option<R> {
        Some(f(&mut self.work.borrow_mut()))
    }
}
