//! [`Tables`] and the traits of the stages, over the maps of this object.

use crate::{maps::*, subprograms::*};
use aya_ebpf::{
    bindings::BPF_NOEXIST,
    helpers::generated::{
        bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns,
    },
    maps::Array,
};
use lb_common::{
    Address, Backend, Flow, FlowKey, Nat, Reason, Reply, ReplyKey, Service, ServiceKey, ServiceView, Vip,
    VipKey,
    backend::own_address,
    exact, flow,
    fragment::{Fragment, FragmentKey},
    guard::{GuardKey, GuardState},
    load,
    nat::Embryonic,
    passive::{self, PassiveFailure},
    quic::{QuicConfig, ServerIdKey},
    rate_limit::SourceKey,
    settings::{IngressSettings, kernel},
    slot::{self, LINE},
    syn_cache::{self, CachedSyn, FilterLine, SynLine},
};
use lb_ebpf::{
    FlowTable, Frame, Tables,
    guard::{GuardTables, limit::LimitTables, martian},
    kernel::global,
    nat::{Added, NatScratch, NatTables},
    packet::{network::Network, parse::Headers},
    quic::{self, QuicTables, Work},
    select::{
        choose::Why,
        fragments::FragmentTable,
        scheduler::{SlotRef, decode},
        service::{self, Match},
    },
};

/// A word of an array of lines.
#[inline(always)]
pub fn word(lines: &Array<slot::Line>, place: u32) -> Option<u32> {
    let line = lines.get(place / LINE)?;
    // SAFETY: the index is below LINE; lbd stores words in one piece.
    Some(unsafe { core::ptr::read_volatile(line.words.as_ptr().add((place % LINE) as usize)) })
}

/// Common state of the SYN cache and the flow filter.
#[inline(always)]
pub fn syn_state() -> Option<&'static syn_cache::State> {
    // SAFETY: both are 64 bytes of integers; lbd stores each word in one piece.
    SYN_CACHE
        .get(syn_cache::STATE)
        .map(|line| unsafe { &*core::ptr::from_ref(line).cast::<syn_cache::State>() })
}

/// A line of the SYN cache and the flow filter.
pub struct Line(*mut syn_cache::SynCacheLine);

impl Line {
    /// The line of a flow.
    #[inline(always)]
    pub fn of(syn_hash: u64) -> Option<Self> {
        SYN_CACHE.get_ptr_mut(syn_cache::line_of(syn_hash)).map(Self)
    }
}

// SAFETY of all accesses below: the entry stays mapped during the run, and each aligned word is read or written in one
// piece. Of two processors that write one entry within nanoseconds, one's is lost, as if it had been evicted.
impl SynLine for Line {
    #[inline(always)]
    fn head(&self, way: usize) -> u64 {
        // SAFETY: as above.
        unsafe { core::ptr::read_volatile(&raw const (*self.0).heads[way]) }
    }

    #[inline(always)]
    fn sequence(&self, way: usize) -> u16 {
        // SAFETY: as above.
        unsafe { core::ptr::read_volatile(&raw const (*self.0).sequences[way]) }
    }

    #[inline(always)]
    fn set_head(&self, way: usize, head: u64) {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*self.0).heads[way], head) }
    }

    #[inline(always)]
    fn set_sequence(&self, way: usize, sequence: u16) {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(&raw mut (*self.0).sequences[way], sequence) }
    }
}

impl FilterLine for Line {
    #[inline(always)]
    fn swept(&self) -> (u64, u16) {
        // SAFETY: as above.
        unsafe {
            (
                core::ptr::read_volatile(&raw const (*self.0).swept),
                core::ptr::read_volatile(&raw const (*self.0).swept_second),
            )
        }
    }

    #[inline(always)]
    fn added(&self) -> [u16; 2] {
        // SAFETY: as above.
        unsafe {
            [
                core::ptr::read_volatile(&raw const (*self.0).added[0]),
                core::ptr::read_volatile(&raw const (*self.0).added[1]),
            ]
        }
    }

    #[inline(always)]
    fn set_added(&self, is_first: bool, bits: u16) {
        let line = self.0;
        // SAFETY: as above.
        unsafe {
            let word = if is_first { &raw mut (*line).added[0] } else { &raw mut (*line).added[1] };
            core::ptr::write_volatile(word, bits);
        }
    }
}

/// Nanoseconds of the boot clock, as of the last timer tick where the kernel has a helper for that.
#[inline(always)]
pub fn coarse_now_ns() -> u64 {
    // SAFETY: no arguments.
    unsafe {
        if global(&SETTINGS).kernel & kernel::COARSE_CLOCK != 0 {
            bpf_ktime_get_coarse_ns()
        } else {
            bpf_ktime_get_ns()
        }
    }
}

/// Whether an address has one of these bits of [`own_address`].
#[inline(always)]
pub fn has_own_address(address: &Address, bits: u32) -> bool {
    // SAFETY: without preallocation an element is not reused before a grace period has passed; one aligned word.
    unsafe { OWN_ADDRESSES.get(address).is_some_and(|known| known & bits != 0) }
}

/// The maps of this object.
pub struct Maps;

impl Maps {
    /// Notes that a table had no room.
    #[inline(always)]
    fn mark_full(service: u32, table: FlowTable) {
        let Some(budget) = WRITE_BUDGETS.get_ptr_mut(service) else { return };
        let now_s = Self.now_s();
        // SAFETY: this CPU's own, and programs do not preempt each other.
        unsafe { (*budget).full_s[(table as usize == FlowTable::UdpFlows as usize) as usize] = now_s };
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn service_index(&self, key: &ServiceKey) -> Option<u32> {
        // SAFETY: the entry may be reused for another key only while lbd changes services; an aligned
        // word is read at once, and the daemon frees no index before a grace period has passed.
        unsafe { SERVICE_INDEX.get(key).copied() }
    }

    #[inline(always)]
    fn exact(&self, line: u32) -> Option<&exact::ExactLine> {
        EXACT.get(line)
    }

    #[inline(always)]
    fn is_no_vip(&self, bit: u32) -> bool {
        // Which of the two is read first is all the same: a bit is set before its address becomes a VIP.
        let is_armed = word(&VIP_FILTER, exact::FILTER_ARMED).is_some_and(|word| word != 0);
        is_armed && word(&VIP_FILTER, bit / 32).is_some_and(|word| word >> (bit % 32) & 1 == 0)
    }

    #[inline(always)]
    fn has_vip_bit(&self, bit: u32) -> bool {
        word(&VIP_FILTER, bit / 32).is_some_and(|word| word >> (bit % 32) & 1 != 0)
    }

    #[inline(always)]
    fn source_fault(&self, source: [u32; 4]) -> Option<Reason> {
        martian::decode(source_fault(source[0], source[1], source[2], source[3]))
    }

    #[inline(always)]
    fn vip(&self, key: &VipKey) -> Option<&Vip> {
        // SAFETY: as above, word by word.
        unsafe { VIPS.get(key) }
    }

    #[inline(always)]
    fn is_vip(&self, vip: [u64; 2]) -> bool {
        is_vip(vip[0], vip[1]) != 0
    }

    #[inline(always)]
    fn find_service(&self, vip: [u64; 2], port: u16, protocol: u8) -> Result<(u32, Match), Reason> {
        service::decode(find_service(vip[0], vip[1], port as u32 | (protocol as u32) << 16))
    }

    #[inline(always)]
    fn parse_network<'a, F: Frame>(
        &self,
        frame: &F,
        _: &IngressSettings,
        _: &'a mut Network,
    ) -> Result<&'a mut Network, Reason> {
        parsed(parse_frame(frame.context().cast()))
    }

    #[inline(always)]
    fn parse<'a, F: Frame>(
        &self,
        frame: &F,
        _: &IngressSettings,
        _: &'a mut Headers,
    ) -> Result<&'a mut Headers, Reason> {
        parsed(parse_headers(frame.context().cast())).map(|network| &mut network.headers)
    }

    #[inline(always)]
    fn service(&self, index: u32) -> Option<&ServiceView> {
        let service = SERVICES.get(index)?;
        // SAFETY: `active` lies in the entry; lbd stores it in one piece after the view is whole.
        let active = unsafe { core::ptr::read_volatile(&service.active) };
        Some(if active == 0 { &service.views[0] } else { &service.views[1] })
    }

    #[inline(always)]
    fn primary(&self, place: u32) -> Option<u32> {
        word(&PRIMARIES, place)
    }

    #[inline(always)]
    fn secondary(&self, place: u32) -> Option<u32> {
        word(&SECONDARIES, place)
    }

    #[inline(always)]
    fn backend(&self, index: u32) -> Option<&Backend> {
        BACKENDS.get(index)
    }

    #[inline(always)]
    fn changing_backend(&self, index: u32) -> Option<&Backend> {
        CHANGING_BACKENDS.get(index)
    }

    #[inline(always)]
    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        // SAFETY: an entry that the LRU reuses meanwhile gives another live flow's backend for this
        // one packet; each word is whole.
        unsafe {
            match table {
                FlowTable::Flows => FLOWS.get(key).copied(),
                // They are in `SYN_CACHE`.
                FlowTable::Syns => None,
                FlowTable::UdpFlows => UDP_FLOWS.get(key).copied(),
            }
        }
    }

    #[inline(always)]
    fn record(&self, table: FlowTable, key: &FlowKey, flow: &Flow) -> bool {
        let written = match table {
            FlowTable::Flows => FLOWS.insert(key, flow, 0).is_ok(),
            FlowTable::Syns => false,
            FlowTable::UdpFlows => UDP_FLOWS.insert(key, flow, 0).is_ok(),
        };
        if !written {
            Self::mark_full(key.service, table);
        }
        written
    }

    #[inline(always)]
    fn touch(&self, table: FlowTable, key: &FlowKey, now_s: u32, flags: u32) {
        let flow = match table {
            FlowTable::Flows => FLOWS.get_ptr_mut(key),
            FlowTable::Syns => None,
            FlowTable::UdpFlows => UDP_FLOWS.get_ptr_mut(key),
        };
        if let Some(flow) = flow {
            // SAFETY: the entry stays mapped during the run; single words are written.
            unsafe {
                (*flow).last_seen_s = now_s;
                (*flow).flags = flags;
            }
        }
    }

    #[inline(always)]
    fn keep(&self, key: &FlowKey, now_s: u32, data_len: u32) {
        if let Some(flow) = FLOWS.get_ptr_mut(key) {
            // SAFETY: as in `touch`.
            unsafe {
                (*flow).last_seen_s = now_s;
                if data_len != 0 {
                    (*flow).flags &= !flow::flags::CLOSING;
                }
            }
        }
    }

    #[inline(always)]
    fn forget(&self, table: FlowTable, key: &FlowKey) {
        // Absent already is as good.
        let _ = match table {
            FlowTable::Flows => FLOWS.remove(key),
            FlowTable::Syns => Ok(()),
            FlowTable::UdpFlows => UDP_FLOWS.remove(key),
        };
    }

    #[inline(always)]
    fn syn_hash(&self, headers: &Headers, service: u32) -> u64 {
        let words = syn_cache::words(headers.source, headers.source_port, headers.port, service);
        hash_flow(words[0], words[1], words[2])
    }

    #[inline(always)]
    fn cached_syn(&self, _: &FlowKey, syn_hash: u64) -> CachedSyn {
        CachedSyn::decode(find_syn(syn_hash))
    }

    #[inline(always)]
    fn cache_syn(&self, _: &FlowKey, syn_hash: u64, backend: u32, sequence: u32) -> bool {
        insert_syn(syn_hash, backend, sequence) != 0
    }

    #[inline(always)]
    fn forget_syn(&self, _: &FlowKey, syn_hash: u64) {
        forget_syn(syn_hash);
    }

    #[inline(always)]
    fn may_hold_flow(&self, syn_hash: u64) -> bool {
        may_hold_flow(syn_hash) != 0
    }

    #[inline(always)]
    fn record_flow(&self, key: &FlowKey, syn_hash: u64, flow: &Flow) -> bool {
        add_to_filter(syn_hash);
        let written = self.record(FlowTable::Flows, key, flow);
        // Another processor may have written the word between our reading and writing it, with an older one's bits.
        add_to_filter(syn_hash);
        written
    }

    #[inline(always)]
    fn schedule(
        &self,
        service: u32,
        view: &ServiceView,
        place: SlotRef,
        now_s: u32,
    ) -> Result<(u32, Why), Reason> {
        decode(schedule_flow(service, view.slot_base, place.number, now_s))
    }

    #[inline(always)]
    fn less_loaded(&self, service: u32, at: u32, best: u64, now_s: u32) -> u64 {
        less_loaded_of(service, at, best, now_s)
    }

    #[inline(always)]
    fn others(&self, service: u32, view: &ServiceView, number: u32, chosen: u32) -> u64 {
        others_in(service, view.slot_base, number, chosen)
    }

    #[inline(always)]
    fn is_taking_over(&self) -> bool {
        // SAFETY: the entry stays mapped during the run; lbd stores one aligned word.
        TAKEOVER.get_ptr(0).is_some_and(|flag| unsafe { core::ptr::read_volatile(flag) } != 0)
    }

    #[inline(always)]
    fn load(&self, backend: u32, now_s: u32) -> u32 {
        let Some(entry) = LOADS.get_ptr(backend) else { return 0 };
        // SAFETY: the entry stays mapped during the run; each word is written in one piece by its side.
        let (report, sum) = unsafe {
            (
                core::ptr::read_volatile(&raw const (*entry).report),
                core::ptr::read_volatile(&raw const (*entry).added),
            )
        };
        load::total(report, sum, now_s)
    }

    #[inline(always)]
    fn charge(&self, backend: u32, now_s: u32) {
        let Some(entry) = LOADS.get_ptr_mut(backend) else { return };
        // SAFETY: as in `load`. Two processors that charge one backend within a few nanoseconds of each other may
        // lose one flow's cost: that is less than what a report is behind. (The target has no atomic addition.)
        unsafe {
            let report = core::ptr::read_volatile(&raw const (*entry).report);
            let sum = core::ptr::read_volatile(&raw const (*entry).added);
            let cost = core::ptr::read_volatile(&raw const (*entry).cost);
            let sum = load::charged(report, sum, now_s, cost);
            core::ptr::write_volatile(&raw mut (*entry).added, sum);
        }
    }

    #[inline(always)]
    fn next_turn(&self, service: u32) -> u64 {
        let Some(turns) = ROUND_ROBIN.get_ptr_mut(service) else { return 0 };
        // SAFETY: this CPU's own counter, as in `count`.
        let turn = unsafe {
            *turns += 1;
            *turns
        };
        // SAFETY: no arguments.
        turn.wrapping_add(unsafe { bpf_get_smp_processor_id() } as u64)
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn now_s(&self) -> u32 {
        (coarse_now_ns() / 1_000_000_000) as u32
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own counter, and programs do not preempt each other.
            unsafe { *counter += 1 };
        }
    }

    #[inline(always)]
    fn account(&self, backend: u32, bytes: u32, new_flow: bool) {
        if let Some(stats) = BACKEND_STATS.get_ptr_mut(backend) {
            // SAFETY: as above.
            unsafe {
                (*stats).packets += 1;
                (*stats).bytes += bytes as u64;
                (*stats).flows += new_flow as u64;
            }
        }
    }

    #[inline(always)]
    fn count_failure(&self, worker: &Address, sign: PassiveFailure) {
        let Some(signs) = PASSIVE_FAILURES.get_ptr_mut(passive::index_of(worker)) else { return };
        // SAFETY: the entry stays mapped during the run. Single words are read and written; what a race loses is a sign
        // among several.
        unsafe {
            let word = match sign {
                PassiveFailure::Unreachable => &raw mut (*signs).unreachable,
                PassiveFailure::Refused => &raw mut (*signs).refused,
            };
            core::ptr::write_volatile(word, core::ptr::read_volatile(word).wrapping_add(1));
        }
    }

    #[inline(always)]
    fn take_icmp(&self, per_s: u32, burst: u32) -> bool {
        let Some(budget) = ICMP_BUDGET.get_ptr_mut(0) else { return false };
        // SAFETY: no arguments.
        let now_ns = unsafe { bpf_ktime_get_ns() };
        // SAFETY: as in `count`.
        let budget = unsafe { &mut *budget };
        budget.take(now_ns, per_s, burst)
    }

    #[inline(always)]
    fn is_worker(&self, address: [u32; 4]) -> bool {
        is_worker(address[0], address[1], address[2], address[3]) != 0
    }

    #[inline(always)]
    fn is_denied(&self, source: [u32; 4]) -> bool {
        guard_source(source[0], source[1], source[2], source[3]) != 0
    }

    #[inline(always)]
    fn limit(&self, service: u32, view: &ServiceView, source: [u32; 4]) -> Option<Reason> {
        let half = |high: u32, low: u32| (high as u64) << 32 | low as u64;
        match limit_flow(service, view.slot_base, half(source[0], source[1]), half(source[2], source[3])) {
            0 => None,
            1 => Some(Reason::RateSource),
            _ => Some(Reason::RateService),
        }
    }

    #[inline(always)]
    fn admits(&self, service: u32, table: FlowTable, now_s: u32) -> bool {
        admits_flow(service, table as u32, now_s, 1) != 0
    }

    #[inline(always)]
    fn admits_record(&self, service: u32, view: &ServiceView, now_s: u32) -> bool {
        admits_flow(service, FlowTable::Flows as u32, now_s, view.record_factor) != 0
    }
}

impl GuardTables for Maps {
    #[inline(always)]
    fn guard_block(&self, place: u32) -> u32 {
        word(&GUARD_BLOCKS, place).unwrap_or(0)
    }

    #[inline(always)]
    fn guard_filter(&self, place: u32) -> u32 {
        word(&GUARD_FILTER, place).unwrap_or(0)
    }

    #[inline(always)]
    fn guard_state(&self) -> Option<&GuardState> {
        GUARD_STATE.get(0)
    }

    #[inline(always)]
    fn guard_entry(&self, key: &GuardKey) -> Option<u32> {
        // SAFETY: without preallocation an element is not reused before a grace period has passed; one aligned word.
        unsafe { GUARD_ENTRIES.get(key).copied() }
    }
}

impl LimitTables for Maps {
    #[inline(always)]
    fn service_bucket(&self, service: u32) -> u64 {
        LIMITS.get(service).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn set_service_bucket(&self, service: u32, word: u64) {
        let Some(bucket) = LIMITS.get_ptr_mut(service) else { return };
        // SAFETY: the entry stays mapped during the run, and the word is written in one piece. Of two processors that
        // write within some nanoseconds one is lost: a flow too many.
        unsafe { core::ptr::write_volatile(bucket, word) };
    }

    #[inline(always)]
    fn source_bucket(&self, key: &SourceKey) -> u64 {
        // SAFETY: one aligned word; an entry that the LRU reuses meanwhile gives another source's for this one flow.
        unsafe { SOURCES.get(key).copied().unwrap_or(0) }
    }

    #[inline(always)]
    fn set_source_bucket(&self, key: &SourceKey, word: u64) {
        // Without room it counts as full.
        let _ = SOURCES.insert(key, &word, 0);
    }

    #[inline(always)]
    fn now_ns(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() }
    }
}

impl FragmentTable for Maps {
    #[inline(always)]
    fn with_fragment<R>(&self, key: &FragmentKey, f: impl FnOnce(&mut Fragment) -> R) -> Option<R> {
        let entry = FRAGMENTS.get_ptr_mut(key)?;
        // SAFETY: the entry stays mapped during the run. Where it is reused, or another processor has a part of
        // the same packet, this one part goes elsewhere or is not noted; each word is whole.
        Some(f(unsafe { &mut *entry }))
    }

    #[inline(always)]
    fn record_fragment(&self, key: &FragmentKey, fragment: &Fragment) -> bool {
        FRAGMENTS.insert(key, fragment, 0).is_ok()
    }
}

/// The view that a caller goes by, whose table begins at `slot_base`: as a rule the live one, which a change that leaves
/// the table alone may share its table with; else the one before.
#[inline(always)]
pub fn view_at(entry: &Service, slot_base: u32) -> &ServiceView {
    // SAFETY: `active` lies in the entry; lbd stores it in one piece.
    let active = unsafe { core::ptr::read_volatile(&entry.active) };
    let is_first = if entry.views[0].slot_base == entry.views[1].slot_base {
        active == 0
    } else {
        entry.views[0].slot_base == slot_base
    };
    if is_first { &entry.views[0] } else { &entry.views[1] }
}

/// What came of writing an entry.
#[inline(always)]
fn added(result: Result<(), i32>) -> Added {
    const EEXIST: i32 = -17;
    match result {
        Ok(()) => Added::Done,
        Err(EEXIST) => Added::Taken,
        Err(_) => Added::Full,
    }
}

impl NatTables for Maps {
    #[inline(always)]
    fn nat<R>(&self, key: &FlowKey, f: impl FnOnce(&mut Nat) -> R) -> Option<R> {
        // SAFETY: the entry stays mapped during the run. Two processors may write words of it at once; each is whole,
        // and either's is right.
        NAT_FLOWS.get_ptr_mut(key).map(|nat| f(unsafe { &mut *nat }))
    }

    #[inline(always)]
    fn reply<R>(&self, key: &ReplyKey, f: impl FnOnce(&mut Reply) -> R) -> Option<R> {
        // SAFETY: as above.
        NAT_REPLIES.get_ptr_mut(key).map(|reply| f(unsafe { &mut *reply }))
    }

    #[inline(always)]
    fn add_nat(&self, key: &FlowKey, nat: &Nat) -> Added {
        added(NAT_FLOWS.insert(key, nat, BPF_NOEXIST.into()))
    }

    #[inline(always)]
    fn add_reply(&self, key: &ReplyKey, reply: &Reply) -> Added {
        added(NAT_REPLIES.insert(key, reply, BPF_NOEXIST.into()))
    }

    #[inline(always)]
    fn remove_nat(&self, key: &FlowKey) -> bool {
        NAT_FLOWS.remove(key).is_ok()
    }

    #[inline(always)]
    fn remove_reply(&self, key: &ReplyKey) -> bool {
        NAT_REPLIES.remove(key).is_ok()
    }

    #[inline(always)]
    fn is_translated(&self, source: &Address) -> bool {
        has_own_address(source, own_address::TRANSLATED)
    }

    #[inline(always)]
    fn embryonic<R>(&self, place: u32, f: impl FnOnce(&mut Embryonic) -> R) -> Option<R> {
        // SAFETY: this CPU's own, and programs do not preempt each other.
        NAT_EMBRYONIC.get_ptr_mut(place).map(|binding| f(unsafe { &mut *binding }))
    }

    #[inline(always)]
    fn sum<F: Frame>(&self, frame: &F, offset: usize, len: usize) -> Option<u32> {
        let buffer = SUM.get_ptr_mut(0)?;
        // SAFETY: this CPU's own, and programs do not preempt each other.
        frame.sum_of(offset, len, unsafe { &mut *buffer })
    }

    #[inline(always)]
    fn scratch<R>(&self, f: impl FnOnce(&mut NatScratch) -> R) -> Option<R> {
        // SAFETY: as above.
        NAT_SCRATCH.get_ptr_mut(0).map(|scratch| f(unsafe { &mut *scratch }))
    }
}

impl QuicTables for Maps {
    #[inline(always)]
    fn quic_config(&self, key: u32) -> Option<&QuicConfig> {
        // SAFETY: without preallocation an element is not reused before a grace period has passed.
        unsafe { QUIC_CONFIGS.get(key) }
    }

    #[inline(always)]
    fn with_work<R>(&self, f: impl FnOnce(&mut Work) -> R) -> Option<R> {
        let work = QUIC_WORK.get_ptr_mut(0)?;
        // SAFETY: this CPU's own, and programs do not preempt each other.
        Some(f(unsafe { &mut *work }))
    }

    #[inline(always)]
    fn read_id(&self, service: u32, key: u32) -> Result<u32, Reason> {
        quic::decode(read_quic_id(service, key))
    }

    #[inline(always)]
    fn quic_server(&self, key: &ServerIdKey) -> Option<u32> {
        // SAFETY: as above; one aligned word.
        unsafe { QUIC_SERVERS.get(key).copied() }
    }
}
