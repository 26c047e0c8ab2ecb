//! Names of programs, maps and globals. User space reaches them only through these constants.

/// Program on an ingress host's NIC.
pub const PROGRAM_INGRESS: &str = "ingress";
/// Program on an ingress host's NIC where users' programs are chained: jumps to them and to ours.
pub const PROGRAM_ROOT: &str = "root";
/// Program on a worker's NIC.
pub const PROGRAM_DECAP: &str = "decap";

/// `HASH<ServiceKey, u32>`: exact port → index in [`SERVICES`].
pub const SERVICE_INDEX: &str = "SERVICE_INDEX";
/// `ARRAY<exact::Line>`, memory-mapped: the same for most of them, for less; see [`crate::exact`]. Not pinned: a program
/// that finds nothing there asks [`SERVICE_INDEX`].
pub const EXACT: &str = "EXACT";
/// `ARRAY<Line>`, memory-mapped: bits of addresses that may be VIPs; see [`crate::exact`]. Not pinned either.
pub const VIP_FILTER: &str = "VIP_FILTER";
/// `HASH<Address, u32>`: addresses that mode `nat` gives to packets to workers, but for pools. Not pinned either.
pub const NAT_SOURCES: &str = "NAT_SOURCES";
/// `HASH<VipKey, Vip>`: what else a VIP serves (port ranges, any port).
pub const VIPS: &str = "VIPS";
/// `ARRAY<Service>`, memory-mapped.
pub const SERVICES: &str = "SERVICES";
/// `ARRAY<Line>`, memory-mapped: the primaries of the tables of all services.
pub const PRIMARIES: &str = "PRIMARIES";
/// `ARRAY<Line>`, memory-mapped: their secondaries.
pub const SECONDARIES: &str = "SECONDARIES";
/// `ARRAY<Backend>`, memory-mapped.
pub const BACKENDS: &str = "BACKENDS";
/// `ARRAY<Load>`, memory-mapped, by backend index.
pub const LOADS: &str = "LOADS";
/// `PERCPU_ARRAY<u64>`, by service index: turns of `rr` and its kin. Not pinned: where they begin is all the same.
pub const TURNS: &str = "TURNS";
/// `HASH<FlowKey, Flow>`: established TCP flows that a stateless lookup would misplace. Never evicts.
pub const FLOWS: &str = "FLOWS";
/// `ARRAY<Line>`, memory-mapped: recent SYN choices that a stateless lookup would not repeat, and which entries [`FLOWS`]
/// may have; see [`crate::note`].
pub const NOTES: &str = "NOTES";
/// `LRU_HASH<FlowKey, Flow>`, of versions before 5: what [`NOTES`] says of SYNs.
pub const SYNS: &str = "SYNS";
/// `HASH<FlowKey, Flow>`: UDP flows. Never evicts.
pub const UDP_FLOWS: &str = "UDP_FLOWS";
/// `LRU_HASH<FragmentKey, Fragment>`: where the first parts of fragmented packets went.
pub const FRAGMENTS: &str = "FRAGMENTS";
/// `HASH<FlowKey, Nat>`: what becomes of clients' packets in mode `nat`.
pub const NAT_FLOWS: &str = "NAT_FLOWS";
/// `HASH<ReplyKey, Reply>`: what becomes of workers' packets in mode `nat`.
pub const NAT_REPLIES: &str = "NAT_REPLIES";
/// `HASH<u32, QuicConfig>`: how connection ids are read, by [`crate::quic::config_key`].
pub const QUIC_CONFIGS: &str = "QUIC_CONFIGS";
/// `HASH<ServerIdKey, u32>`: which backend a QUIC server id is.
pub const QUIC_SERVERS: &str = "QUIC_SERVERS";
/// `ARRAY<Line>`, memory-mapped: two bits for each block of 256 IPv4 addresses, see [`crate::guard::block`].
pub const GUARD_BLOCKS: &str = "GUARD_BLOCKS";
/// `ARRAY<Line>`, memory-mapped: bits of IPv6 prefixes, see [`crate::guard::level`].
pub const GUARD_FILTER: &str = "GUARD_FILTER";
/// `ARRAY<GuardState>`, memory-mapped, one entry.
pub const GUARD_STATE: &str = "GUARD_STATE";
/// `HASH<GuardKey, u32>`: prefixes of the deny and allow lists, see [`crate::guard::verdict`].
pub const GUARD_ENTRIES: &str = "GUARD_ENTRIES";
/// `ARRAY<u64>`, by service index: the service's bucket of new flows, see [`crate::limit::take`].
pub const LIMITS: &str = "LIMITS";
/// `LRU_HASH<SourceKey, u64>`: buckets of sources.
pub const SOURCES: &str = "SOURCES";
/// `PERCPU_ARRAY<Pressure>`, by service index: what is written to the flow tables.
pub const PRESSURE: &str = "PRESSURE";
/// `PERCPU_ARRAY<BackendStats>`, by backend index.
pub const BACKEND_STATS: &str = "BACKEND_STATS";
/// `ARRAY<Signs>`, memory-mapped, by [`crate::sign::place`]: signs that workers may be dead.
pub const SIGNS: &str = "SIGNS";
/// `PERCPU_ARRAY<u64>`, by [`crate::Reason`]; each program has its own.
pub const REASONS: &str = "REASONS";
/// `DEVMAP_HASH<u32>`: egress interfaces by ifindex.
pub const EGRESS: &str = "EGRESS";
/// `PERCPU_ARRAY<IcmpBudget>`, one entry: the rate limit of generated ICMP.
pub const ICMP_BUDGET: &str = "ICMP_BUDGET";
/// `ARRAY<u32>`, one entry: the [`crate::ABI_VERSION`] of the pinned maps.
pub const ABI: &str = "ABI";
/// `HASH<Address, u32>`: addresses on which a worker accepts encapsulated packets.
pub const DECAP_ADDRESSES: &str = "DECAP_ADDRESSES";
/// `HASH<Address, u32>`: VIPs that a worker serves.
pub const DECAP_VIPS: &str = "DECAP_VIPS";
/// `ARRAY<ReplyHop>`, by family: how answers of a worker's program leave.
pub const REPLY_HOPS: &str = "REPLY_HOPS";

/// Program on interfaces that probes leave by (tc, egress).
pub const PROGRAM_PROBE_OUT: &str = "probe_out";
/// Program on interfaces that their answers come in by (tc, ingress).
pub const PROGRAM_PROBE_IN: &str = "probe_in";
/// `HASH<u32, ProbeWay>`: by mark. Not pinned: probes end with lbd.
pub const PROBE_WAYS: &str = "PROBE_WAYS";

/// `PROG_ARRAY`: programs that are reached by tail call, by the indices of [`stage`]. Each object has its own.
pub const STAGES: &str = "STAGES";
/// `PROG_ARRAY`: users' programs before and after ours, and ours for those before ([`stage::BEFORE`],
/// [`stage::AFTER`], [`stage::INGRESS`]). One for all ABI versions, because users' programs hold on to it; pinned
/// under the name that [`SHARED`] gives.
pub const CHAIN: &str = "CHAIN";
/// `PERCPU_ARRAY<Young>`, a ring: bindings in the order of their making; not pinned.
pub const NAT_YOUNG: &str = "NAT_YOUNG";
/// `ARRAY<u32>`, one entry: whether the program at [`stage::PREDECESSOR`] is asked about flows that no table knows.
pub const TAKEOVER: &str = "TAKEOVER";
/// `ARRAY<[u8; LAYOUT_LEN]>`, one entry: what map types look like ([`crate::describe`]), as JSON ended by zeros. Never
/// changes its own form.
pub const LAYOUT: &str = "LAYOUT";
/// Bytes of [`LAYOUT`]'s entry.
pub const LAYOUT_LEN: usize = 16_384;

/// Maps that all ABI versions share, and the names of their pins.
pub const SHARED: [(&str, &str); 1] = [(CHAIN, "STAGES")];

/// Indices of [`STAGES`]: what an ingress host does rarely, or at length, is a program of its own, so that the
/// common way stays short.
pub mod stage {
    /// Another's program, before ours.
    pub const BEFORE: u32 = 0;
    /// Full address translation.
    pub const NAT: u32 = 1;
    /// ICMP and ICMPv6 to a VIP.
    pub const ICMP: u32 = 2;
    /// Fragments.
    pub const FRAGMENT: u32 = 3;
    /// QUIC.
    pub const QUIC: u32 = 4;
    /// Another's program, for what ours hands to the host.
    pub const AFTER: u32 = 5;
    /// Our first program, where another's goes on when it has let a packet pass.
    pub const INGRESS: u32 = 6;
    /// Full address translation: new flows.
    pub const NAT_BIND: u32 = 7;
    /// Full address translation: ICMP errors.
    pub const NAT_ERROR: u32 = 8;
    /// Full address translation: fragments.
    pub const NAT_FRAGMENT: u32 = 9;
    /// Nobody jumps here: user space tries at this place which programs the array takes.
    pub const TRIAL: u32 = 14;
    /// The program of the ABI version before, while its flows are taken over.
    pub const PREDECESSOR: u32 = 15;
    /// Places in the map.
    pub const COUNT: u32 = 16;

    /// In the worker's object: SYNs, which may be answered by cookie.
    pub const COOKIE: u32 = 0;
    /// Programs of the worker's object that go there: name and place.
    pub const DECAP_PROGRAMS: [(&str, u32); 1] = [("cookie", COOKIE)];
    /// Programs of the ingress object that go there: name and place.
    pub const INGRESS_PROGRAMS: [(&str, u32); 7] = [
        ("icmp", ICMP),
        ("fragment", FRAGMENT),
        ("nat", NAT),
        ("nat_bind", NAT_BIND),
        ("nat_error", NAT_ERROR),
        ("nat_fragment", NAT_FRAGMENT),
        ("quic", QUIC),
    ];
}

/// Read-only globals: the one setting block of each program.
pub const SETTINGS: &str = "SETTINGS";
/// aya-log's level, a read-only global; 0 compiles logging away.
pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";

/// Maps of the ingress program that are pinned.
pub const INGRESS_MAPS: [&str; 30] = [
    SERVICE_INDEX,
    VIPS,
    SERVICES,
    PRIMARIES,
    SECONDARIES,
    BACKENDS,
    LOADS,
    FLOWS,
    NOTES,
    UDP_FLOWS,
    FRAGMENTS,
    NAT_FLOWS,
    NAT_REPLIES,
    QUIC_CONFIGS,
    QUIC_SERVERS,
    GUARD_BLOCKS,
    GUARD_FILTER,
    GUARD_STATE,
    GUARD_ENTRIES,
    LIMITS,
    SOURCES,
    PRESSURE,
    BACKEND_STATS,
    SIGNS,
    REASONS,
    EGRESS,
    STAGES,
    TAKEOVER,
    LAYOUT,
    ABI,
];
/// Maps of the decap program that are pinned.
pub const DECAP_MAPS: [&str; 6] = [DECAP_ADDRESSES, DECAP_VIPS, REASONS, REPLY_HOPS, STAGES, ABI];
