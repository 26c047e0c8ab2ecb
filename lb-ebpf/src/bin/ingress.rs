//! XDP program of an ingress host: maps, and the entry point around `lb_ebpf::ingress`.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the xdp attribute adds an undocumented function")]

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST, xdp_action, xdp_md},
    helpers::generated::{
        bpf_get_prandom_u32, bpf_get_smp_processor_id, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns,
    },
    macros::{map, xdp},
    maps::{Array, DevMapHash, HashMap, LruHashMap, PerCpuArray, ProgramArray},
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use lb_common::{
    ABI_VERSION, Address, Backend, BackendStats, Flow, FlowKey, Load, Nat, Reason, Reply, ReplyKey, Service,
    ServiceKey, ServiceView, Slot, Vip, VipKey, exact, flow,
    fragment::{Fragment, FragmentKey},
    guard::{GuardKey, GuardState, block, level},
    limit::{FULL_S, Pressure, SourceKey},
    limits, load,
    names::{LAYOUT_LEN, stage},
    nat::Young,
    note,
    quic::{QuicConfig, ServerIdKey},
    settings::{IngressSettings, features, kernel},
    sign::{self, Sign, Signs},
    slot::{LINE, Line},
    stats::IcmpBudget,
};
use lb_ebpf::{
    FlowTable, Frame, Tables, Verdict,
    guard::{self, GuardTables},
    guard::{
        limit::{self, LimitTables},
        martian,
    },
    icmp::dispatch,
    ingress::fragment::FragmentTable,
    ingress::{Outcome, process},
    kernel::{Settings, XdpFrame, action, global},
    nat::{self, Added, NatTables, Way},
    packet::Sum,
    packet::{
        network::{self, Network},
        parse::{Headers, parse},
    },
    quic::{self, QuicTables, Work},
    second_chance::header::{NONE, others_of},
    select::{
        choose::Why,
        scheduler::{Place, decode, encode, lesser, place_new},
        service::{self, Match},
    },
};

#[unsafe(no_mangle)]
static SETTINGS: Global<IngressSettings> = Global::new(IngressSettings::DEFAULT);

#[map]
static SERVICE_INDEX: HashMap<ServiceKey, u32> = HashMap::with_max_entries(limits::SERVICES, 0);
#[map]
static EXACT: Array<exact::Line> = Array::with_max_entries(exact::LINES, BPF_F_MMAPABLE);
#[map]
static VIP_FILTER: Array<Line> = Array::with_max_entries(exact::FILTER_WORDS / LINE, BPF_F_MMAPABLE);
#[map]
static VIPS: HashMap<VipKey, Vip> = HashMap::with_max_entries(limits::VIPS, 0);
#[map]
static SERVICES: Array<Service> = Array::with_max_entries(limits::SERVICES, BPF_F_MMAPABLE);
#[map]
static PRIMARIES: Array<Line> = Array::with_max_entries(limits::SLOTS / LINE, BPF_F_MMAPABLE);
#[map]
static SECONDARIES: Array<Line> = Array::with_max_entries(limits::SLOTS / LINE, BPF_F_MMAPABLE);
#[map]
static BACKENDS: Array<Backend> = Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map]
static LOADS: Array<Load> = Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map]
static TURNS: PerCpuArray<u64> = PerCpuArray::with_max_entries(limits::SERVICES, 0);
#[map]
static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(limits::FLOWS, 0);
#[map]
static NOTES: Array<note::Line> = Array::with_max_entries(note::LINES + 1, BPF_F_MMAPABLE);
#[map]
static UDP_FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(limits::UDP_FLOWS, 0);
#[map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::with_max_entries(limits::FRAGMENTS, 0);
#[map]
static NAT_FLOWS: HashMap<FlowKey, Nat> = HashMap::with_max_entries(limits::NAT_FLOWS, BPF_F_NO_PREALLOC);
#[map]
static NAT_REPLIES: HashMap<ReplyKey, Reply> =
    HashMap::with_max_entries(limits::NAT_FLOWS, BPF_F_NO_PREALLOC);
#[map]
static NAT_SOURCES: HashMap<Address, u32> = HashMap::with_max_entries(limits::NAT_SOURCES, BPF_F_NO_PREALLOC);
#[map]
static NAT_YOUNG: PerCpuArray<Young> = PerCpuArray::with_max_entries(limits::NAT_YOUNG, 0);
#[map]
static WAY: PerCpuArray<Way> = PerCpuArray::with_max_entries(1, 0);
#[map]
static NETWORK: PerCpuArray<Network> = PerCpuArray::with_max_entries(1, 0);
#[map]
static SUM: PerCpuArray<Sum> = PerCpuArray::with_max_entries(1, 0);
#[map]
static QUIC_CONFIGS: HashMap<u32, QuicConfig> =
    HashMap::with_max_entries(limits::QUIC_CONFIGS, BPF_F_NO_PREALLOC);
#[map]
static QUIC_SERVERS: HashMap<ServerIdKey, u32> =
    HashMap::with_max_entries(limits::BACKENDS, BPF_F_NO_PREALLOC);
#[map]
static QUIC_WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);
#[map]
static GUARD_BLOCKS: Array<Line> = Array::with_max_entries(block::WORDS / LINE, BPF_F_MMAPABLE);
#[map]
static GUARD_FILTER: Array<Line> = Array::with_max_entries(level::WORDS / LINE, BPF_F_MMAPABLE);
#[map]
static GUARD_STATE: Array<GuardState> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
static GUARD_ENTRIES: HashMap<GuardKey, u32> =
    HashMap::with_max_entries(limits::GUARD_ENTRIES, BPF_F_NO_PREALLOC);
#[map]
static LIMITS: Array<u64> = Array::with_max_entries(limits::SERVICES, 0);
#[map]
static SOURCES: LruHashMap<SourceKey, u64> = LruHashMap::with_max_entries(limits::SOURCES, 0);
#[map]
static PRESSURE: PerCpuArray<Pressure> = PerCpuArray::with_max_entries(limits::SERVICES, 0);
#[map]
static BACKEND_STATS: PerCpuArray<BackendStats> = PerCpuArray::with_max_entries(limits::BACKENDS, 0);
#[map]
static SIGNS: Array<Signs> = Array::with_max_entries(sign::COUNT, BPF_F_MMAPABLE);
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::COUNT, 0);
#[map]
static ICMP_BUDGET: PerCpuArray<IcmpBudget> = PerCpuArray::with_max_entries(1, 0);
#[map]
static EGRESS: DevMapHash = DevMapHash::with_max_entries(limits::EGRESS, 0);
#[map]
static STAGES: ProgramArray = ProgramArray::with_max_entries(stage::COUNT, 0);
#[map]
static CHAIN: ProgramArray = ProgramArray::with_max_entries(stage::COUNT, 0);
#[map]
static TAKEOVER: Array<u32> = Array::with_max_entries(1, 0);
#[map]
static LAYOUT: Array<[u8; LAYOUT_LEN]> = Array::with_max_entries(1, 0);
#[map]
static ABI: Array<u32> = Array::with_max_entries(1, 0);

/// A word of an array of lines.
#[inline(always)]
fn word(lines: &Array<Line>, place: u32) -> Option<u32> {
    let line = lines.get(place / LINE)?;
    // SAFETY: the index is below LINE; lbd stores words in one piece.
    Some(unsafe { core::ptr::read_volatile(line.words.as_ptr().add((place % LINE) as usize)) })
}

/// What notes and the filter of flows go by.
#[inline(always)]
fn note_state() -> Option<&'static note::State> {
    // SAFETY: both are 64 bytes of integers; lbd stores each word in one piece.
    NOTES.get(note::STATE).map(|line| unsafe { &*core::ptr::from_ref(line).cast::<note::State>() })
}

/// The settings of this object.
struct Own;

impl Settings for Own {
    #[inline(always)]
    fn kernel() -> u32 {
        global(&SETTINGS).kernel
    }
}

type Xdp<'a> = XdpFrame<'a, Own>;

/// The maps of this object.
struct Maps;

impl Maps {
    /// Notes that a table had no room.
    #[inline(always)]
    fn is_full(service: u32, table: FlowTable) {
        let Some(pressure) = PRESSURE.get_ptr_mut(service) else { return };
        let now_s = Self.now_s();
        // SAFETY: this CPU's own, and programs do not preempt each other.
        unsafe { (*pressure).full_s[(table as usize == FlowTable::UdpFlows as usize) as usize] = now_s };
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
    fn exact(&self, line: u32) -> Option<&exact::Line> {
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
    fn flow(&self, table: FlowTable, key: &FlowKey) -> Option<Flow> {
        // SAFETY: an entry that the LRU reuses meanwhile gives another live flow's backend for this
        // one packet; each word is whole.
        unsafe {
            match table {
                FlowTable::Flows => FLOWS.get(key).copied(),
                // See `note`.
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
            Self::is_full(key.service, table);
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
                if flags != 0 {
                    (*flow).flags |= flags;
                }
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
    fn mark(&self, headers: &Headers, service: u32) -> u64 {
        let [first, second, third] = note::words(headers.source, headers.source_port, headers.port, service);
        flow_mark(first, second, third)
    }

    #[inline(always)]
    fn note(&self, _: &FlowKey, mark: u64, now_s: u32) -> Option<Flow> {
        let found = noted_syn(mark, now_s);
        let (head, sequence) = (found as u32, (found >> 32) as u32);
        if head == u32::MAX {
            return None;
        }
        Some(Flow::new(note::backend(head as u64), now_s.wrapping_sub(head >> 24), sequence, 0))
    }

    #[inline(always)]
    fn write_note(&self, _: &FlowKey, mark: u64, note: &Flow) -> bool {
        note_syn(mark, note.backend, note.created_s, note.last_seen_s) != 0
    }

    #[inline(always)]
    fn forget_note(&self, _: &FlowKey, mark: u64) {
        forget_syn(mark);
    }

    #[inline(always)]
    fn may_have_flow(&self, mark: u64) -> bool {
        may_have_flow(mark) != 0
    }

    #[inline(always)]
    fn record_flow(&self, key: &FlowKey, mark: u64, flow: &Flow) -> bool {
        expect_flow(mark);
        let written = self.record(FlowTable::Flows, key, flow);
        // Another processor may have written the word between our reading and writing it, with an older one's bits.
        expect_flow(mark);
        written
    }

    #[inline(always)]
    fn place(
        &self,
        service: u32,
        view: &ServiceView,
        place: Place,
        now_s: u32,
    ) -> Result<(u32, Why), Reason> {
        decode(place_flow(service, view.slot_base, place.number, now_s))
    }

    #[inline(always)]
    fn lesser(&self, service: u32, at: u32, best: u64, now_s: u32) -> u64 {
        lesser_load(service, at, best, now_s)
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
    fn turn(&self, service: u32) -> u64 {
        let Some(turns) = TURNS.get_ptr_mut(service) else { return 0 };
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
        // SAFETY: no arguments.
        let now_ns = unsafe {
            if global(&SETTINGS).kernel & kernel::COARSE_CLOCK != 0 {
                bpf_ktime_get_coarse_ns()
            } else {
                bpf_ktime_get_ns()
            }
        };
        (now_ns / 1_000_000_000) as u32
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
    fn sign(&self, worker: &Address, sign: Sign) {
        let Some(signs) = SIGNS.get_ptr_mut(sign::place(worker)) else { return };
        // SAFETY: the entry stays mapped during the run. Single words are read and written; what a race loses is a sign
        // among several.
        unsafe {
            let word = match sign {
                Sign::Unreachable => &raw mut (*signs).unreachable,
                Sign::Refused => &raw mut (*signs).refused,
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
        admits_flow(service, table as u32, now_s) != 0
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

/// [`guard::is_denied`]. A global function: verified once, by itself, and what it found out about the source is not
/// carried on.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn guard_source(a: u32, b: u32, c: u32, d: u32) -> u32 {
    guard::is_denied(&Maps, [a, b, c, d]) as u32
}

/// [`limit::admit`] for the view whose table begins at `slot_base`: 0 if the flow may begin, 1 if its source has had its
/// share, 2 if the service has. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn limit_flow(service: u32, slot_base: u32, high: u64, low: u64) -> u32 {
    let Some(entry) = SERVICES.get(service) else { return 0 };
    let view = view_at(entry, slot_base);
    let source = [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32];
    match limit::admit(&Maps, service, view, source) {
        None => 0,
        Some(Reason::RateSource) => 1,
        Some(_) => 2,
    }
}

/// Whether a table may take one more flow of a service. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn admits_flow(service: u32, table: u32, now_s: u32) -> u32 {
    const SYNS: u32 = FlowTable::Syns as u32;
    const UDP: u32 = FlowTable::UdpFlows as u32;
    let Some(pressure) = PRESSURE.get_ptr_mut(service) else { return 0 };
    // SAFETY: this CPU's own, and programs do not preempt each other.
    let pressure = unsafe { &mut *pressure };
    let settings = global(&SETTINGS);
    let full_s = pressure.full_s[(table == UDP) as usize];
    if full_s != 0 && now_s.saturating_sub(full_s) < FULL_S {
        return 0;
    }
    let is_admitted = match table {
        SYNS => pressure.syns.admit(now_s, settings.syns_per_s),
        UDP => pressure.udp.admit(now_s, settings.udp_per_s),
        _ => pressure.flows.trickle(now_s, settings.flows_per_s),
    };
    is_admitted as u32
}

/// What the next two functions found, in `NETWORK`, or the reason that their answer stands for.
#[inline(always)]
fn parsed(answer: u32) -> Result<&'static mut Network, Reason> {
    // LLVM knows which reasons the functions give, and leaves out the table's bounds check, of which the verifier lives.
    let answer = core::hint::black_box(answer);
    if answer != PARSED {
        return Err(Reason::from_index(answer).unwrap_or(Reason::Truncated));
    }
    let network = NETWORK.get_ptr_mut(0).ok_or(Reason::BrokenTable)?;
    // SAFETY: this CPU's own, and programs do not preempt each other. It holds a whole one since the first packet, and
    // held zeros before, which are one as well.
    Ok(unsafe { &mut *network })
}

/// The answer of the next two functions where they refuse nothing.
const PARSED: u32 = u32::MAX;

/// [`network::parse_network`] into `NETWORK`. A global function: verified once, by itself. Of what lies in a map the
/// verifier knows nothing, so the rest is walked once, and not for each form of headers.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn parse_frame(ctx: *mut xdp_md) -> u32 {
    let ctx = XdpContext::new(ctx);
    let place = match parsed(PARSED) {
        Ok(place) => place,
        Err(reason) => return reason as u32,
    };
    match network::parse_network(&Xdp::new(&ctx), global(&SETTINGS), place) {
        Ok(()) => PARSED,
        Err(reason) => reason as u32,
    }
}

/// [`parse`] into `NETWORK`. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn parse_headers(ctx: *mut xdp_md) -> u32 {
    let ctx = XdpContext::new(ctx);
    let place = match parsed(PARSED) {
        Ok(place) => place,
        Err(reason) => return reason as u32,
    };
    match parse(&Xdp::new(&ctx), global(&SETTINGS)) {
        Ok(headers) => {
            place.headers = headers;
            PARSED
        }
        Err(reason) => reason as u32,
    }
}

/// Whether an address, as two words, is a VIP. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn is_vip(first: u64, second: u64) -> u32 {
    Maps.vip(&VipKey { vip: zerocopy::transmute!([first, second]) }).is_some() as u32
}

/// [`martian::fault`]. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn source_fault(a: u32, b: u32, c: u32, d: u32) -> u32 {
    martian::encode(martian::fault(&Maps, [a, b, c, d]))
}

/// [`service::find`] for a port (low half) and protocol. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn find_service(first: u64, second: u64, port_protocol: u32) -> u64 {
    let (port, protocol) = (port_protocol as u16, (port_protocol >> 16) as u8);
    service::encode(service::find(&Maps, [first, second], port, protocol))
}

/// [`note::mark`] under this host's key. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn flow_mark(first: u64, second: u64, third: u64) -> u64 {
    note::mark(note_state().map_or([0; 2], |state| state.key), [first, second, third])
}

/// Says in the filter that the table of flows may have one with this mark. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn expect_flow(mark: u64) -> u32 {
    let (Some(state), Some(line)) = (note_state(), NOTES.get_ptr_mut(note::line_of(mark))) else { return 0 };
    // SAFETY: the entries stay mapped during the run; words are read and written in one piece.
    unsafe {
        let generation = core::ptr::read_volatile(&state.generation);
        let recent =
            if generation & 1 == 0 { &raw mut (*line).recent[0] } else { &raw mut (*line).recent[1] };
        let (bits, bit) = (core::ptr::read_volatile(recent), note::recent_bit(mark));
        if bits & bit == 0 {
            core::ptr::write_volatile(recent, bits | bit);
        }
    }
    1
}

/// Whether the table of flows may have one with this mark. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn may_have_flow(mark: u64) -> u32 {
    if note_state().is_none_or(|state| state.armed == 0) {
        return 1;
    }
    let Some(line) = NOTES.get(note::line_of(mark)) else { return 1 };
    // SAFETY: references to aligned words, which are stored in one piece.
    let (settled, settled_too, recent) = unsafe {
        (
            core::ptr::read_volatile(&line.settled),
            core::ptr::read_volatile(&line.settled_too),
            [core::ptr::read_volatile(&line.recent[0]), core::ptr::read_volatile(&line.recent[1])],
        )
    };
    note::may_have(settled, settled_too, recent, mark) as u32
}

/// Where a recent SYN was placed: sequence number (high half), age in seconds (bits 24–31), backend; all ones in the low
/// half if none is noted. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn noted_syn(mark: u64, now_s: u32) -> u64 {
    let Some(line) = NOTES.get(note::line_of(mark)) else { return u64::MAX };
    let mut i = 0;
    while i < note::WAYS {
        // SAFETY: a reference to an aligned word, which processors store in one piece.
        let head = unsafe { core::ptr::read_volatile(&line.heads[i]) };
        if note::is_of(head, mark) {
            let age_s = note::age_s(head, now_s);
            return (line.sequences[i] as u64) << 32 | (age_s << 24 | note::backend(head)) as u64;
        }
        i += 1;
    }
    u64::MAX
}

/// Notes where a SYN is placed. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn note_syn(mark: u64, backend: u32, sequence: u32, now_s: u32) -> u32 {
    let Some(line) = NOTES.get_ptr_mut(note::line_of(mark)) else { return 0 };
    // SAFETY: the entry stays mapped during the run; each word is written in one piece. Of two processors that take one
    // place in the same nanoseconds, one's note is lost, as if it had been pushed out.
    unsafe {
        let heads = &raw mut (*line).heads;
        let (mut place, mut most, mut i) = (0, 0, 0);
        while i < note::WAYS {
            let yields = note::yields(core::ptr::read_volatile(&raw const (*heads)[i]), mark, now_s);
            if yields >= most {
                (place, most) = (i, yields);
            }
            i += 1;
        }
        let place = place % note::WAYS;
        core::ptr::write_volatile(&raw mut (*line).sequences[place], sequence);
        core::ptr::write_volatile(&raw mut (*heads)[place], note::head(mark, backend, now_s));
    }
    1
}

/// Forgets a SYN. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn forget_syn(mark: u64) -> u32 {
    let Some(line) = NOTES.get_ptr_mut(note::line_of(mark)) else { return 0 };
    let mut i = 0;
    while i < note::WAYS {
        // SAFETY: as above.
        unsafe {
            let head = &raw mut (*line).heads[i];
            if note::is_of(core::ptr::read_volatile(head), mark) {
                core::ptr::write_volatile(head, 0);
            }
        }
        i += 1;
    }
    1
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
fn view_at(entry: &Service, slot_base: u32) -> &ServiceView {
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
        // SAFETY: nothing is read of the entry.
        unsafe { NAT_SOURCES.get(source).is_some() }
    }

    #[inline(always)]
    fn young<R>(&self, place: u32, f: impl FnOnce(&mut Young) -> R) -> Option<R> {
        // SAFETY: this CPU's own, and programs do not preempt each other.
        NAT_YOUNG.get_ptr_mut(place).map(|young| f(unsafe { &mut *young }))
    }

    #[inline(always)]
    fn sum<F: Frame>(&self, frame: &F, offset: usize, len: usize) -> Option<u32> {
        let buffer = SUM.get_ptr_mut(0)?;
        // SAFETY: this CPU's own, and programs do not preempt each other.
        frame.sum_of(offset, len, unsafe { &mut *buffer })
    }

    #[inline(always)]
    fn way<R>(&self, f: impl FnOnce(&mut Way) -> R) -> Option<R> {
        // SAFETY: as above.
        WAY.get_ptr_mut(0).map(|way| f(unsafe { &mut *way }))
    }
}

/// [`place_new`] for the view whose table begins at `slot_base`. A global function: verified once, by itself.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn place_flow(service: u32, slot_base: u32, number: u32, now_s: u32) -> u64 {
    let Some(entry) = SERVICES.get(service) else { return u64::MAX };
    let view = view_at(entry, slot_base);
    let at = slot_base.wrapping_add(number);
    let (Some(primary), Some(secondary)) = (word(&PRIMARIES, at), word(&SECONDARIES, at)) else {
        return u64::MAX;
    };
    encode(place_new(&Maps, service, view, Place { slot: Slot { primary, secondary }, number }, now_s))
}

/// [`others_of`] for the view whose table begins at `slot_base`. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn others_in(service: u32, slot_base: u32, number: u32, chosen: u32) -> u64 {
    let Some(entry) = SERVICES.get(service) else { return NONE };
    let view = view_at(entry, slot_base);
    others_of(&Maps, service, view, number, chosen)
}

/// [`lesser`]. A global function too: its caller is a loop.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn lesser_load(service: u32, at: u32, best: u64, now_s: u32) -> u64 {
    lesser(&Maps, service, at, best, now_s)
}

/// Balances the packets of one interface.
#[xdp(frags)]
#[inline(always)]
pub fn ingress(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = process(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
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

/// [`quic::read_id`] of the id in `QUIC_WORK`. A global function likewise.
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn read_quic_id(service: u32, key: u32) -> u64 {
    quic::encode(quic::read_id(&Maps, service, key))
}

/// Packets of QUIC services; see [`stage::QUIC`].
#[xdp(frags)]
#[inline(always)]
pub fn quic(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = lb_ebpf::quic::process(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
}

/// Stands on the interface where another's program is to run before or after ours: jumps to it if its place is
/// filled, and else to ours. See [`stage::BEFORE`].
#[xdp(frags)]
#[inline(always)]
pub fn root(ctx: XdpContext) -> u32 {
    // SAFETY: nothing in this frame needs to be dropped.
    unsafe {
        CHAIN.tail_call(&ctx, stage::BEFORE);
        CHAIN.tail_call(&ctx, stage::INGRESS);
    }
    Maps.count(Reason::StageMissing);
    xdp_action::XDP_PASS
}

/// What is sent to a VIP by ICMP; see [`stage::ICMP`].
#[xdp(frags)]
#[inline(always)]
pub fn icmp(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = dispatch::process(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
}

/// Fragments; see [`stage::FRAGMENT`].
#[xdp(frags)]
#[inline(always)]
pub fn fragment(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = lb_ebpf::ingress::fragment::process(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
}

/// Full address translation; see [`stage::NAT`].
#[xdp(frags)]
#[inline(always)]
pub fn nat(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = nat::process(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
}

/// The same for new flows; see [`stage::NAT_BIND`].
#[xdp(frags)]
#[inline(always)]
pub fn nat_bind(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = nat::process_new(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
}

/// The same for ICMP errors; see [`stage::NAT_ERROR`].
#[xdp(frags)]
#[inline(always)]
pub fn nat_error(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = nat::process_error(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
}

/// The same for fragments; see [`stage::NAT_FRAGMENT`].
#[xdp(frags)]
#[inline(always)]
pub fn nat_fragment(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let (verdict, outcome) = nat::process_fragment(&mut Xdp::new(&ctx), &Maps, settings);
    finish(&ctx, verdict, outcome)
}

/// The XDP action of a verdict, or a jump to the next program.
#[inline(always)]
fn finish(ctx: &XdpContext, verdict: Verdict, outcome: Outcome) -> u32 {
    match outcome {
        Outcome::Forwarded { service, backend } => debug!(ctx, "service {} backend {}", service, backend),
        Outcome::Returned { service } => debug!(ctx, "service {} to its client", service),
        Outcome::Not(reason) => debug!(ctx, "reason {}", reason as u32),
    }
    if let Verdict::Stage(index) = verdict {
        // SAFETY: nothing in this frame needs to be dropped.
        unsafe { STAGES.tail_call(ctx, index) };
    }
    match action(verdict, &EGRESS) {
        Ok(xdp_action::XDP_PASS) if global(&SETTINGS).features & features::CHAIN != 0 => {
            // SAFETY: as above.
            unsafe { CHAIN.tail_call(ctx, stage::AFTER) };
            xdp_action::XDP_PASS
        }
        Ok(action) => action,
        Err(reason) => {
            Maps.count(reason);
            if matches!(Verdict::of(reason), Verdict::Pass) {
                xdp_action::XDP_PASS
            } else {
                xdp_action::XDP_DROP
            }
        }
    }
}

// Kept in the object so that a loader can compare it before anything runs.
const _: () = assert!(ABI_VERSION == IngressSettings::DEFAULT.abi_version);

lb_ebpf::object!();
