//! Names of programs, maps and globals. User space reaches them only through these constants.

/// Program on an ingress host's NIC.
pub const PROGRAM_INGRESS: &str = "ingress";
/// Program on an ingress host's NIC in a chain with users' programs: tail calls them and the ingress program.
pub const PROGRAM_ROOT: &str = "root";
/// Program on a worker's NIC.
pub const PROGRAM_DECAP: &str = "decap";

/// `HASH<ServiceKey, u32>`: exact port → index in [`SERVICES`].
pub const SERVICE_INDEX: &str = "SERVICE_INDEX";
/// `ARRAY<ExactLine>`, memory-mapped: cache of most of [`SERVICE_INDEX`], cheaper to look up; see [`crate::exact`]. Not
/// pinned: a program that finds nothing in it looks up [`SERVICE_INDEX`].
pub const EXACT: &str = "EXACT";
/// `ARRAY<Line>`, memory-mapped: filter of addresses that may be VIPs; see [`crate::exact`]. Not pinned.
pub const VIP_FILTER: &str = "VIP_FILTER";
/// `HASH<Address, u32>`: addresses of workers, and source addresses of packets to workers in mode `nat` except pools, as
/// bits of [`crate::backend::own_address`]. Not pinned.
pub const OWN_ADDRESSES: &str = "OWN_ADDRESSES";
/// `HASH<VipKey, Vip>`: services of a VIP for port ranges and any port.
pub const VIPS: &str = "VIPS";
/// `ARRAY<Service>`, memory-mapped.
pub const SERVICES: &str = "SERVICES";
/// `ARRAY<Line>`, memory-mapped: primaries of the tables of all services.
pub const PRIMARIES: &str = "PRIMARIES";
/// `ARRAY<Line>`, memory-mapped: secondaries of the tables of all services.
pub const SECONDARIES: &str = "SECONDARIES";
/// `ARRAY<Backend>`, memory-mapped.
pub const BACKENDS: &str = "BACKENDS";
/// `ARRAY<Backend>`, memory-mapped, by backend index: entries as they were before the change that is under way
/// ([`crate::backend::flags::CHANGING`]). Not pinned: without an entry in it, a program asks the FIB.
pub const CHANGING_BACKENDS: &str = "CHANGING_BACKENDS";
/// `ARRAY<Load>`, memory-mapped, by backend index.
pub const LOADS: &str = "LOADS";
/// `PERCPU_ARRAY<u64>`, by service index: positions of `rr` and `wrr`. Not pinned: the starting position does not matter.
pub const ROUND_ROBIN: &str = "ROUND_ROBIN";
/// `HASH<FlowKey, Flow>`: established TCP flows that a stateless lookup would misplace. Never evicts.
pub const FLOWS: &str = "FLOWS";
/// `ARRAY<Line>`, memory-mapped: recent SYN choices that a stateless lookup would not repeat, and a filter of the
/// entries in [`FLOWS`]; see [`crate::syn_cache`].
pub const SYN_CACHE: &str = "SYN_CACHE";
/// `ARRAY`, of ABI version 5: the SYN choices that are now in [`SYN_CACHE`], in lines of another form.
pub const NOTES: &str = "NOTES";
/// `LRU_HASH<FlowKey, Flow>`, of ABI versions before 5: the SYN choices that are now in [`SYN_CACHE`].
pub const SYNS: &str = "SYNS";
/// `HASH<FlowKey, Flow>`: UDP flows. Never evicts.
pub const UDP_FLOWS: &str = "UDP_FLOWS";
/// `LRU_HASH<FragmentKey, Fragment>`: destinations of the first fragments of fragmented packets.
pub const FRAGMENTS: &str = "FRAGMENTS";
/// `HASH<FlowKey, Nat>`: translation of clients' packets in mode `nat`.
pub const NAT_FLOWS: &str = "NAT_FLOWS";
/// `HASH<ReplyKey, Reply>`: translation of workers' packets in mode `nat`.
pub const NAT_REPLIES: &str = "NAT_REPLIES";
/// `HASH<u32, QuicConfig>`: formats of connection ids, by [`crate::quic::config_key`].
pub const QUIC_CONFIGS: &str = "QUIC_CONFIGS";
/// `HASH<ServerIdKey, u32>`: index of the backend of a QUIC server id.
pub const QUIC_SERVERS: &str = "QUIC_SERVERS";
/// `ARRAY<Line>`, memory-mapped: two bits for each block of 256 IPv4 addresses, see [`crate::guard::block`].
pub const GUARD_BLOCKS: &str = "GUARD_BLOCKS";
/// `ARRAY<Line>`, memory-mapped: bits of IPv6 prefixes, see [`crate::guard::level`].
pub const GUARD_FILTER: &str = "GUARD_FILTER";
/// `ARRAY<GuardState>`, memory-mapped, one entry.
pub const GUARD_STATE: &str = "GUARD_STATE";
/// `HASH<GuardKey, u32>`: prefixes of the deny and allow lists, see [`crate::guard::verdict`].
pub const GUARD_ENTRIES: &str = "GUARD_ENTRIES";
/// `ARRAY<u64>`, by service index: bucket of the service's new flows, see [`crate::rate_limit::take`].
pub const LIMITS: &str = "LIMITS";
/// `LRU_HASH<SourceKey, u64>`: buckets of new flows of sources.
pub const SOURCES: &str = "SOURCES";
/// `PERCPU_ARRAY<WriteBudget>`, by service index: write budgets of the flow tables.
pub const WRITE_BUDGETS: &str = "WRITE_BUDGETS";
/// `PERCPU_ARRAY<BackendStats>`, by backend index.
pub const BACKEND_STATS: &str = "BACKEND_STATS";
/// `ARRAY<PassiveFailures>`, memory-mapped, by [`crate::passive::index_of`]: passive health signals about workers.
pub const PASSIVE_FAILURES: &str = "PASSIVE_FAILURES";
/// `PERCPU_ARRAY<u64>`, by [`crate::Reason`]; each program has its own map.
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
/// `ARRAY<ReplyHop>`, by family: next hops of answers that a worker's program sends.
pub const REPLY_HOPS: &str = "REPLY_HOPS";

/// Program on interfaces through which probes leave (tc, egress).
pub const PROGRAM_PROBE_OUT: &str = "probe_out";
/// Program on interfaces through which answers to probes arrive (tc, ingress).
pub const PROGRAM_PROBE_IN: &str = "probe_in";
/// `HASH<u32, ProbeTunnel>`: encapsulation of a probe, by mark. Not pinned: probes end with lbd.
pub const PROBE_TUNNELS: &str = "PROBE_TUNNELS";

/// `PROG_ARRAY`: programs that are reached by tail call, by the indices of [`stage`]. Each object has its own array.
pub const STAGES: &str = "STAGES";
/// `PROG_ARRAY`: users' programs before and after ours, and our own for users' programs to call ([`stage::BEFORE`],
/// [`stage::AFTER`], [`stage::INGRESS`]). Shared by all ABI versions, because users' programs hold a reference to it;
/// [`SHARED`] gives the name of its pin.
pub const DISPATCHER: &str = "DISPATCHER";
/// `PERCPU_ARRAY<Embryonic>`, a ring: unconfirmed bindings in the order of creation; not pinned.
pub const NAT_EMBRYONIC: &str = "NAT_EMBRYONIC";
/// `ARRAY<u32>`, one entry: whether the program at [`stage::PREDECESSOR`] gets flows that no table knows.
pub const TAKEOVER: &str = "TAKEOVER";
/// `ARRAY<[u8; LAYOUT_LEN]>`, one entry: layout of the map types ([`crate::describe`]), as JSON ended by zeros. Its own
/// form never changes.
pub const LAYOUT: &str = "LAYOUT";
/// Size of the entry of [`LAYOUT`] in bytes.
pub const LAYOUT_LEN: usize = 16_384;

/// Maps that all ABI versions share, and the names of their pins.
pub const SHARED: [(&str, &str); 1] = [(DISPATCHER, "STAGES")];

/// Indices of [`STAGES`]: rare or long work of an ingress host is in separate programs, so that the common path stays
/// short.
pub mod stage {
    /// A user's program, before ours.
    pub const BEFORE: u32 = 0;
    /// Full address translation.
    pub const NAT: u32 = 1;
    /// ICMP and ICMPv6 to a VIP.
    pub const ICMP: u32 = 2;
    /// Fragments.
    pub const FRAGMENT: u32 = 3;
    /// QUIC.
    pub const QUIC: u32 = 4;
    /// A user's program, for packets that ours passes to the host.
    pub const AFTER: u32 = 5;
    /// Our first program, which a user's program calls for packets that it lets pass.
    pub const INGRESS: u32 = 6;
    /// Full address translation: new flows.
    pub const NAT_BIND: u32 = 7;
    /// Full address translation: ICMP errors.
    pub const NAT_ERROR: u32 = 8;
    /// Full address translation: fragments.
    pub const NAT_FRAGMENT: u32 = 9;
    /// Answers to packets of services without a backend.
    pub const REJECT: u32 = 10;
    /// Never called: user space tries here which programs the array accepts.
    pub const TRIAL: u32 = 14;
    /// The program of the previous ABI version, while its flows are taken over.
    pub const PREDECESSOR: u32 = 15;
    /// Number of entries of the map.
    pub const COUNT: u32 = 16;

    /// In the worker's object: SYNs, which may be answered by a SYN cookie.
    pub const COOKIE: u32 = 0;
    /// Programs of the worker's object in its array: name and index.
    pub const DECAP_PROGRAMS: [(&str, u32); 1] = [("cookie", COOKIE)];
    /// Programs of the ingress object in its array: name and index.
    pub const INGRESS_PROGRAMS: [(&str, u32); 8] = [
        ("icmp", ICMP),
        ("fragment", FRAGMENT),
        ("nat", NAT),
        ("nat_bind", NAT_BIND),
        ("nat_error", NAT_ERROR),
        ("nat_fragment", NAT_FRAGMENT),
        ("quic", QUIC),
        ("reject", REJECT),
    ];
}

/// Read-only global: the settings of each program.
pub const SETTINGS: &str = "SETTINGS";
/// Read-only global: log level of aya-log; 0 removes logging at load time.
pub const LOG_LEVEL: &str = "AYA_LOG_LEVEL";

/// Pinned maps of the ingress program.
pub const INGRESS_MAPS: [&str; 30] = [
    SERVICE_INDEX,
    VIPS,
    SERVICES,
    PRIMARIES,
    SECONDARIES,
    BACKENDS,
    LOADS,
    FLOWS,
    SYN_CACHE,
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
    WRITE_BUDGETS,
    BACKEND_STATS,
    PASSIVE_FAILURES,
    REASONS,
    EGRESS,
    STAGES,
    TAKEOVER,
    LAYOUT,
    ABI,
];
/// Pinned maps of the decap program.
pub const DECAP_MAPS: [&str; 6] = [DECAP_ADDRESSES, DECAP_VIPS, REASONS, REPLY_HOPS, STAGES, ABI];
