//! The maps of the ingress object and its settings. lbd opens them by name.

use aya_ebpf::{
    Global,
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{Array, DevMapHash, HashMap, LruHashMap, PerCpuArray, ProgramArray},
};
use lb_common::{
    Address, Backend, BackendStats, Flow, FlowKey, Load, Nat, Reason, Reply, ReplyKey, Service, ServiceKey,
    Vip, VipKey, exact,
    fragment::{Fragment, FragmentKey},
    guard::{GuardKey, GuardState, block, level},
    limits,
    names::{LAYOUT_LEN, stage},
    nat::Embryonic,
    passive::{self, PassiveFailures},
    quic::{QuicConfig, ServerIdKey},
    rate_limit::{SourceKey, WriteBudget},
    settings::IngressSettings,
    slot::{LINE, Line},
    stats::IcmpBudget,
    syn_cache,
};
use lb_ebpf::{
    nat::NatScratch,
    packet::{Sum, network::Network},
    quic::Work,
};

#[unsafe(no_mangle)]
pub static SETTINGS: Global<IngressSettings> = Global::new(IngressSettings::DEFAULT);

#[map]
pub static SERVICE_INDEX: HashMap<ServiceKey, u32> = HashMap::with_max_entries(limits::SERVICES, 0);
#[map]
pub static EXACT: Array<exact::ExactLine> = Array::with_max_entries(exact::LINES, BPF_F_MMAPABLE);
#[map]
pub static VIP_FILTER: Array<Line> = Array::with_max_entries(exact::FILTER_WORDS / LINE, BPF_F_MMAPABLE);
#[map]
pub static VIPS: HashMap<VipKey, Vip> = HashMap::with_max_entries(limits::VIPS, 0);
#[map]
pub static SERVICES: Array<Service> = Array::with_max_entries(limits::SERVICES, BPF_F_MMAPABLE);
#[map]
pub static PRIMARIES: Array<Line> = Array::with_max_entries(limits::SLOTS / LINE, BPF_F_MMAPABLE);
#[map]
pub static SECONDARIES: Array<Line> = Array::with_max_entries(limits::SLOTS / LINE, BPF_F_MMAPABLE);
#[map]
pub static BACKENDS: Array<Backend> = Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map]
pub static CHANGING_BACKENDS: Array<Backend> = Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map]
pub static LOADS: Array<Load> = Array::with_max_entries(limits::BACKENDS, BPF_F_MMAPABLE);
#[map]
pub static ROUND_ROBIN: PerCpuArray<u64> = PerCpuArray::with_max_entries(limits::SERVICES, 0);
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(limits::FLOWS, 0);
#[map]
pub static SYN_CACHE: Array<syn_cache::SynCacheLine> =
    Array::with_max_entries(syn_cache::LINES + 1, BPF_F_MMAPABLE);
#[map]
pub static UDP_FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(limits::UDP_FLOWS, 0);
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::with_max_entries(limits::FRAGMENTS, 0);
#[map]
pub static NAT_FLOWS: HashMap<FlowKey, Nat> = HashMap::with_max_entries(limits::NAT_FLOWS, BPF_F_NO_PREALLOC);
#[map]
pub static NAT_REPLIES: HashMap<ReplyKey, Reply> =
    HashMap::with_max_entries(limits::NAT_FLOWS, BPF_F_NO_PREALLOC);
#[map]
pub static OWN_ADDRESSES: HashMap<Address, u32> =
    HashMap::with_max_entries(limits::NAT_SOURCES + limits::BACKENDS, BPF_F_NO_PREALLOC);
#[map]
pub static NAT_EMBRYONIC: PerCpuArray<Embryonic> = PerCpuArray::with_max_entries(limits::NAT_EMBRYONIC, 0);
#[map]
pub static NAT_SCRATCH: PerCpuArray<NatScratch> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static NETWORK: PerCpuArray<Network> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static SUM: PerCpuArray<Sum> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static QUIC_CONFIGS: HashMap<u32, QuicConfig> =
    HashMap::with_max_entries(limits::QUIC_CONFIGS, BPF_F_NO_PREALLOC);
#[map]
pub static QUIC_SERVERS: HashMap<ServerIdKey, u32> =
    HashMap::with_max_entries(limits::BACKENDS, BPF_F_NO_PREALLOC);
#[map]
pub static QUIC_WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static GUARD_BLOCKS: Array<Line> = Array::with_max_entries(block::WORDS / LINE, BPF_F_MMAPABLE);
#[map]
pub static GUARD_FILTER: Array<Line> = Array::with_max_entries(level::WORDS / LINE, BPF_F_MMAPABLE);
#[map]
pub static GUARD_STATE: Array<GuardState> = Array::with_max_entries(1, BPF_F_MMAPABLE);
#[map]
pub static GUARD_ENTRIES: HashMap<GuardKey, u32> =
    HashMap::with_max_entries(limits::GUARD_ENTRIES, BPF_F_NO_PREALLOC);
#[map]
pub static LIMITS: Array<u64> = Array::with_max_entries(limits::SERVICES, 0);
#[map]
pub static SOURCES: LruHashMap<SourceKey, u64> = LruHashMap::with_max_entries(limits::SOURCES, 0);
#[map]
pub static WRITE_BUDGETS: PerCpuArray<WriteBudget> = PerCpuArray::with_max_entries(limits::SERVICES, 0);
#[map]
pub static BACKEND_STATS: PerCpuArray<BackendStats> = PerCpuArray::with_max_entries(limits::BACKENDS, 0);
#[map]
pub static PASSIVE_FAILURES: Array<PassiveFailures> = Array::with_max_entries(passive::COUNT, BPF_F_MMAPABLE);
#[map]
pub static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::COUNT, 0);
#[map]
pub static ICMP_BUDGET: PerCpuArray<IcmpBudget> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static EGRESS: DevMapHash = DevMapHash::with_max_entries(limits::EGRESS, 0);
#[map]
pub static STAGES: ProgramArray = ProgramArray::with_max_entries(stage::COUNT, 0);
#[map]
pub static DISPATCHER: ProgramArray = ProgramArray::with_max_entries(stage::COUNT, 0);
#[map]
pub static TAKEOVER: Array<u32> = Array::with_max_entries(1, 0);
#[map]
pub static LAYOUT: Array<[u8; LAYOUT_LEN]> = Array::with_max_entries(1, 0);
#[map]
pub static ABI: Array<u32> = Array::with_max_entries(1, 0);
