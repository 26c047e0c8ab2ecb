//! Reasons why a packet was not simply forwarded: one named counter each.

/// Declares [`Reason`] and its functions from one list, so that they cannot disagree.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal, $fate:ident;)+) => {
        /// Reason for the fate of a packet; the index in the `REASONS` map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// All reasons, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
            /// The reason with this counter, if any.
            #[inline(always)]
            pub fn from_index(index: u32) -> Option<Self> { Self::ALL.get(index as usize).copied() }
            /// Number of reasons.
            pub const COUNT: u32 = Self::ALL.len() as u32;

            /// Name of the reason in metrics and on the command line.
            pub const fn label(self) -> &'static str { match self { $(Self::$name => $label,)+ } }
            /// Fate of a packet with this reason.
            pub const fn fate(self) -> Fate { match self { $(Self::$name => Fate::$fate,)+ } }
            /// Description in one line.
            pub const fn describe(self) -> &'static str { match self { $(Self::$name => concat!($($doc),+).trim_ascii(),)+ } }
        }
    };
}

/// What happens to a packet with a [`Reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Passed to this host's stack unchanged.
    Pass,
    /// Dropped.
    Drop,
    /// Answered to its sender.
    Answer,
    /// Forwarded or delivered; the counter records how.
    Note,
}

reasons! {
    /// Ethernet type that is neither IPv4 nor IPv6 (ARP, LLDP, ...)
    NotIp = "not_ip", Pass;
    /// Frame or header is truncated
    Truncated = "truncated", Pass;
    /// IPv4 header invalid: version, length or total length
    BadIpv4 = "bad_ipv4", Pass;
    /// IPv6 header invalid: version or payload length
    BadIpv6 = "bad_ipv6", Pass;
    /// More than two VLAN tags
    TooManyVlans = "too_many_vlans", Pass;
    /// IPv6 extension headers: too many, too long or of an unsupported type
    BadExtension = "bad_extension", Pass;
    /// Neither TCP nor UDP
    OtherProtocol = "other_protocol", Pass;
    /// ICMP or ICMPv6 that is neither an echo request for a VIP nor about one of its flows
    Icmp = "icmp", Pass;
    /// Program of this stage is not loaded
    StageMissing = "stage_missing", Pass;
    /// TCP or UDP header invalid: data offset or length
    BadTransport = "bad_transport", Pass;
    /// Fragment of a packet for this host, or of a packet that is neither TCP nor UDP
    Fragment = "fragment", Pass;
    /// IPv6 is switched off
    Ipv6Off = "ipv6_off", Pass;
    /// Packet has VLAN tags, and their support is switched off
    VlanOff = "vlan_off", Pass;
    /// Destination is not a VIP
    NotVip = "not_vip", Pass;
    /// Destination is a VIP, but it has no service on this port
    NoService = "no_service", Pass;
    /// Service has no backend that can take the flow
    NoBackend = "no_backend", Drop;
    /// Slot or backend entry missing: the tables contradict each other
    BrokenTable = "broken_table", Drop;
    /// IPv6 packet for a backend whose tunnel cannot carry it
    BadFamily = "bad_family", Drop;
    /// Forwarding mode is unknown to this program
    BadMode = "bad_mode", Drop;
    /// Mode l2: the worker is behind a router instead of on this segment
    NotOnLink = "not_on_link", Drop;
    /// Mode nat: no free source port for a new flow to this worker
    NatNoPort = "nat_no_port", Drop;
    /// Mode nat: the table of bindings is full
    NatNoRoom = "nat_no_room", Drop;
    /// Mode nat: packet of an established flow without a binding; a new binding is made, and the worker's reset tells the client
    NatUnknown = "nat_unknown", Note;
    /// Mode nat: worker's packet, forwarded to its client
    NatReply = "nat_reply", Note;
    /// Mode nat: binding of a flow that has ended, reused for a new flow
    NatReused = "nat_reused", Note;
    /// Mode nat: unconfirmed binding (its client has not acknowledged an answer), or in a full table the longest idle one of UDP, removed for a newer one
    NatGaveWay = "nat_gave_way", Note;
    /// Mode nat: checksum that the sender had left to a network card, completed
    NatCompleted = "nat_completed", Note;
    /// Mode nat: later fragment to an address of this host whose first fragment was not seen as a translated packet: the host's own, or part of an answer that came too early
    NatFragment = "nat_fragment", Pass;
    /// Mode nat: TTL or hop limit expired
    NatTtl = "nat_ttl", Drop;
    /// Mode nat: ICMP error about a translated packet, forwarded
    NatError = "nat_error", Note;
    /// Too big for the path after encapsulation; sender told by ICMP
    TooBigAnswered = "too_big_answered", Answer;
    /// Too big for the path after encapsulation; ICMP suppressed by its rate limit
    TooBigDropped = "too_big_dropped", Drop;
    /// Fragment of a flow, forwarded to the backend of its first fragment
    FragmentForwarded = "fragment_forwarded", Note;
    /// Fragment whose first fragment was not seen, or was seen too long ago
    FragmentUnknown = "fragment_unknown", Drop;
    /// Fragment that overlaps another of its packet, or follows an overlap
    FragmentOverlap = "fragment_overlap", Drop;
    /// Fragment that splits the transport header
    FragmentTiny = "fragment_tiny", Drop;
    /// Fragment with an impossible length or offset
    FragmentBad = "fragment_bad", Drop;
    /// QUIC packet whose connection id names its backend
    QuicRouted = "quic_routed", Note;
    /// QUIC packet whose connection id has no config (chosen by the client); placed by its 5-tuple
    QuicUnroutable = "quic_unroutable", Note;
    /// QUIC packet whose connection id does not name a backend that is up; placed by its 5-tuple
    QuicUnknownId = "quic_unknown_id", Note;
    /// QUIC packet whose connection id is shorter than its config says; placed by its 5-tuple
    QuicShortId = "quic_short_id", Note;
    /// QUIC packet that ends before its connection id ends; placed by its 5-tuple
    QuicTruncated = "quic_truncated", Note;
    /// ICMP error about a flow, forwarded to its backend
    IcmpErrorForwarded = "icmp_error_forwarded", Note;
    /// ICMP error that quotes too little of a packet, or no valid packet
    IcmpBadQuote = "icmp_bad_quote", Drop;
    /// ICMP error that quotes a packet which the VIP cannot have sent: forged
    IcmpForeignQuote = "icmp_foreign_quote", Drop;
    /// Echo request for a VIP, answered
    EchoAnswered = "echo_answered", Answer;
    /// Echo request for a VIP; answer suppressed by the rate limit
    EchoDropped = "echo_dropped", Drop;
    /// No route to the backend
    NoRoute = "no_route", Drop;
    /// Next hop's MAC address is not resolved
    NoNeighbour = "no_neighbour", Drop;
    /// Egress interface is not in the device map
    NoEgress = "no_egress", Drop;
    /// No room for the outer headers
    NoHeadroom = "no_headroom", Drop;
    /// Next hop looked up in the kernel's FIB, because the daemon had not filled it in
    FibLookup = "fib_lookup", Note;
    /// Flow could not be written to the flow table
    FlowNotRecorded = "flow_not_recorded", Note;
    /// Flow copied from the SYN cache, or from the previous primary, to the flow table
    FlowPromoted = "flow_promoted", Note;
    /// Backend of a tracked flow has been removed; placed as a new flow
    FlowStale = "flow_stale", Note;
    /// Flow known only to the program of the other ABI version that lbd takes over from; handed to that program
    TakenOver = "taken_over", Note;

    /// Worker: decapsulated from ipip and delivered
    DecapIpip = "decap_ipip", Note;
    /// Worker: decapsulated from gue and delivered
    DecapGue = "decap_gue", Note;
    /// Worker: outer destination is not one of this worker's addresses
    DecapNotOurs = "decap_not_ours", Pass;
    /// Worker: inner destination is not a VIP served here
    DecapNotVip = "decap_not_vip", Drop;
    /// Worker: inner packet invalid
    DecapBadInner = "decap_bad_inner", Drop;
    /// Worker: GUE header invalid, of another variant or with unknown flags
    DecapBadGue = "decap_bad_gue", Drop;
    /// Worker: encapsulated packet arrived as fragments
    DecapFragment = "decap_fragment", Drop;
    /// Worker: TTL or hop limit expired
    DecapTtl = "decap_ttl", Drop;
    /// Worker: congestion mark on the outer header of a packet that cannot carry it (RFC 6040)
    DecapEcn = "decap_ecn", Drop;
    /// Worker: SYN answered with a SYN cookie of its listener, because the listener's queue is full
    DecapCookie = "decap_cookie", Answer;
    /// Worker: frame could not be shortened
    DecapAdjust = "decap_adjust", Drop;
    /// Worker: packet with a second-chance header, delivered by the first worker
    ChanceFirst = "chance_first", Note;
    /// Worker: packet that one other worker sent on, delivered by the second worker
    ChanceSecond = "chance_second", Note;
    /// Worker: packet that two other workers sent on, delivered by the third worker
    ChanceThird = "chance_third", Note;
    /// Worker: no socket for the flow on any of the workers; delivered, so that the stack resets it
    ChanceNone = "chance_none", Note;
    /// Worker: no socket for the flow; sent on to the next backend that may have it
    ChanceSentOn = "chance_sent_on", Note;
    /// Worker: second-chance header in the GUE private data invalid, or of another version
    ChanceBad = "chance_bad", Drop;
    /// Worker: second-chance header would make the packet loop, or visit too many workers
    ChanceLoop = "chance_loop", Drop;

    /// Source is on the deny list
    GuardDenied = "guard_denied", Drop;
    /// New flow above the rate limit of its service
    RateService = "rate_service", Drop;
    /// New flow above the rate limit of its source
    RateSource = "rate_source", Drop;
    /// New flow of a service under flood, or without room in a flow table: placed by hash, which needs no entry.
    /// Or packet of a flow from before a transition that is not recorded yet for the same reason: it goes to its backend for as long as the transition lasts
    FlowFlood = "flow_flood", Note;
    /// Residency: no allowed region of the service takes flows, or the flow was established in a region that is not allowed
    Residency = "residency", Drop;

    /// Invalid source address: loopback, multicast, unspecified or reserved (RFC 1812 5.3.7, RFC 4291 2.5)
    MartianSource = "martian_source", Drop;
    /// Source is a VIP, an address that mode nat uses for packets to workers, or a worker's own service (UDP): forged, or in a loop
    OwnSource = "own_source", Drop;
    /// Mode nat: packet of an unknown flow that neither starts a flow nor can belong to an established one (a reset, or without an acknowledgement)
    NatStray = "nat_stray", Drop;
    /// Cached SYN replaced by a newer one before its handshake ended: the rest of that handshake goes to the slot's primary
    SynEvicted = "syn_evicted", Note;
    /// Service has no backend that can take the flow; sender answered with a TCP reset or ICMP port unreachable (`when_all_down = reset`)
    NoBackendAnswered = "no_backend_answered", Answer;
}
