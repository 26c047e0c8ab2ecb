//! Why a packet was not simply forwarded: one named counter each.

/// Declares [`Reason`] and its tables from one list, so that they cannot disagree.
macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $label:literal, $fate:ident;)+) => {
        /// Reason for the fate of a packet; the index in the `REASONS` map.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $name,)+ }

        impl Reason {
            /// All of them, in the order of their counters.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
            /// The one with this counter.
            #[inline(always)]
            pub fn of(index: u32) -> Option<Self> { Self::ALL.get(index as usize).copied() }
            /// How many there are.
            pub const COUNT: u32 = Self::ALL.len() as u32;

            /// Name in metrics and on the command line.
            pub const fn label(self) -> &'static str { match self { $(Self::$name => $label,)+ } }
            /// What became of the packet.
            pub const fn fate(self) -> Fate { match self { $(Self::$name => Fate::$fate,)+ } }
            /// One line for people.
            pub const fn describe(self) -> &'static str { match self { $(Self::$name => concat!($($doc),+),)+ } }
        }
    };
}

/// What becomes of a packet with a [`Reason`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Handed to this host's stack unchanged.
    Pass,
    /// Dropped.
    Drop,
    /// Answered to its sender.
    Answer,
    /// Forwarded or delivered all the same; the counter only tells how.
    Note,
}

reasons! {
    /// Ethernet type that is neither IPv4 nor IPv6 (ARP, LLDP, ...)
    NotIp = "not_ip", Pass;
    /// Frame or header cut short
    Truncated = "truncated", Pass;
    /// IPv4 header invalid: version, length or total length
    BadIpv4 = "bad_ipv4", Pass;
    /// IPv6 header invalid: version or payload length
    BadIpv6 = "bad_ipv6", Pass;
    /// More than two VLAN tags
    TooManyVlans = "too_many_vlans", Pass;
    /// IPv6 extension headers: too many, too long or of a kind not looked through
    BadExtension = "bad_extension", Pass;
    /// Neither TCP nor UDP
    OtherProtocol = "other_protocol", Pass;
    /// ICMP or ICMPv6 that is neither an echo request for a VIP nor about one of its flows
    Icmp = "icmp", Pass;
    /// Program of this stage is not loaded
    StageMissing = "stage_missing", Pass;
    /// TCP or UDP header invalid: data offset or length
    BadTransport = "bad_transport", Pass;
    /// Fragment of a packet for this host, or of what is neither TCP nor UDP
    Fragment = "fragment", Pass;
    /// IPv6 is switched off
    Ipv6Off = "ipv6_off", Pass;
    /// VLAN tags are not looked through
    VlanOff = "vlan_off", Pass;
    /// Destination is no VIP
    NotVip = "not_vip", Pass;
    /// Destination is a VIP, but no service has this port
    NoService = "no_service", Pass;
    /// Service has no backend that can take the flow
    NoBackend = "no_backend", Drop;
    /// Slot or backend entry missing: the tables contradict each other
    BrokenTable = "broken_table", Drop;
    /// IPv6 packet for a backend whose tunnel cannot carry it
    BadFamily = "bad_family", Drop;
    /// Forwarding mode not known to this program
    BadMode = "bad_mode", Drop;
    /// Mode l2: the worker is behind a router, and not on this segment
    NotOnLink = "not_on_link", Drop;
    /// Mode nat: no port was free for a new flow to this worker
    NatNoPort = "nat_no_port", Drop;
    /// Mode nat: the table of bindings is full
    NatNoRoom = "nat_no_room", Drop;
    /// Mode nat: packet of an established flow that has no binding; a new one is made, and the worker's reset tells the client
    NatUnknown = "nat_unknown", Note;
    /// Mode nat: worker's packet, sent on to its client
    NatReply = "nat_reply", Note;
    /// Mode nat: binding of a flow that is over, taken for a new one
    NatReused = "nat_reused", Note;
    /// Mode nat: binding whose client had not shown that it is there, removed for a newer one
    NatGaveWay = "nat_gave_way", Note;
    /// Mode nat: checksum that its sender had left to a network card, completed
    NatCompleted = "nat_completed", Note;
    /// Mode nat: later fragment to an address of this host, of no translated packet whose first was seen: the host's own, or an answer's part that came too early
    NatFragment = "nat_fragment", Pass;
    /// Mode nat: TTL or hop limit used up
    NatTtl = "nat_ttl", Drop;
    /// Mode nat: ICMP error about a translated packet, sent on
    NatError = "nat_error", Note;
    /// Too big for the path once encapsulated; sender told by ICMP
    TooBigAnswered = "too_big_answered", Answer;
    /// Too big for the path once encapsulated; ICMP withheld by its rate limit
    TooBigDropped = "too_big_dropped", Drop;
    /// Fragment of a flow of ours, forwarded where its first part went
    FragmentForwarded = "fragment_forwarded", Note;
    /// Fragment whose first part was not seen, or too long ago
    FragmentUnknown = "fragment_unknown", Drop;
    /// Fragment that overlaps another of its packet, or follows one that did
    FragmentOverlap = "fragment_overlap", Drop;
    /// Fragment that splits the transport header
    FragmentTiny = "fragment_tiny", Drop;
    /// Fragment with an impossible length or offset
    FragmentBad = "fragment_bad", Drop;
    /// QUIC packet whose connection id names its backend
    QuicRouted = "quic_routed", Note;
    /// QUIC packet whose connection id has no config (a client's own); placed by its 5-tuple
    QuicUnroutable = "quic_unroutable", Note;
    /// QUIC packet whose connection id names no backend that is up; placed by its 5-tuple
    QuicUnknownId = "quic_unknown_id", Note;
    /// QUIC packet whose connection id is shorter than its config says; placed by its 5-tuple
    QuicShortId = "quic_short_id", Note;
    /// QUIC packet that ends before its connection id does; placed by its 5-tuple
    QuicTruncated = "quic_truncated", Note;
    /// ICMP error about a flow, forwarded to its backend
    IcmpErrorForwarded = "icmp_error_forwarded", Note;
    /// ICMP error that quotes too little of a packet, or nothing that is one
    IcmpBadQuote = "icmp_bad_quote", Drop;
    /// ICMP error that quotes a packet which the VIP cannot have sent: forged
    IcmpForeignQuote = "icmp_foreign_quote", Drop;
    /// Echo request for a VIP, answered
    EchoAnswered = "echo_answered", Answer;
    /// Echo request for a VIP; answer withheld by the rate limit
    EchoDropped = "echo_dropped", Drop;
    /// No route to the backend
    NoRoute = "no_route", Drop;
    /// Next hop's MAC address is not resolved
    NoNeighbour = "no_neighbour", Drop;
    /// Egress interface is not in the device map
    NoEgress = "no_egress", Drop;
    /// No room for the outer headers
    NoHeadroom = "no_headroom", Drop;
    /// Next hop found by the kernel's FIB, not filled in by the daemon
    FibLookup = "fib_lookup", Note;
    /// Flow could not be written to the flow table
    FlowNotRecorded = "flow_not_recorded", Note;
    /// Flow moved from the recent SYNs, or from the previous primary, to the flow table
    FlowPromoted = "flow_promoted", Note;
    /// Backend of a tracked flow is gone; placed as if unknown
    FlowStale = "flow_stale", Note;
    /// Flow known to the program of another ABI version only, which lbd is taking over from; handed to that program
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
    /// Worker: GUE header invalid, of another variant or with flags not understood
    DecapBadGue = "decap_bad_gue", Drop;
    /// Worker: encapsulated packet arrived as fragments
    DecapFragment = "decap_fragment", Drop;
    /// Worker: TTL or hop limit used up
    DecapTtl = "decap_ttl", Drop;
    /// Worker: congestion mark on the outer header of a packet that cannot carry it (RFC 6040)
    DecapEcn = "decap_ecn", Drop;
    /// Worker: SYN answered by its listener's cookie, because the listener's queue is full
    DecapCookie = "decap_cookie", Answer;
    /// Worker: frame could not be shortened
    DecapAdjust = "decap_adjust", Drop;
    /// Worker: packet with other backends to ask, delivered by the first
    ChanceFirst = "chance_first", Note;
    /// Worker: packet that another worker sent on, delivered by the second
    ChanceSecond = "chance_second", Note;
    /// Worker: packet that two workers sent on, delivered by the third
    ChanceThird = "chance_third", Note;
    /// Worker: no socket for the flow here, nor at those asked before; delivered, so that the stack resets it
    ChanceNone = "chance_none", Note;
    /// Worker: no socket for the flow here; sent on to the next backend that may have it
    ChanceSentOn = "chance_sent_on", Note;
    /// Worker: private data of a GUE header invalid, or of another version
    ChanceBad = "chance_bad", Drop;
    /// Worker: packet with other backends to ask would go round, or visit too many
    ChanceLoop = "chance_loop", Drop;

    /// Source is on the deny list
    GuardDenied = "guard_denied", Drop;
    /// New flow above its service's rate
    RateService = "rate_service", Drop;
    /// New flow above its source's rate
    RateSource = "rate_source", Drop;
    /// New flow of a service under flood, or for which a flow table has no room: placed by hash, so that nothing need be written
    FlowFlood = "flow_flood", Note;
    /// Service's residency: none of its regions takes flows, or the flow was established where it may not run
    Residency = "residency", Drop;

    /// Source address from which no host sends: loopback, multicast, unspecified or reserved (RFC 1812 5.3.7, RFC 4291 2.5)
    MartianSource = "martian_source", Drop;
    /// Source address is a VIP, or one that mode nat gives to packets to workers: forged, or gone in a circle
    OwnSource = "own_source", Drop;
    /// Mode nat: packet of no known flow that neither begins one nor can belong to an established one (a reset, or without an acknowledgement)
    NatStray = "nat_stray", Drop;
}

impl Reason {
    /// The reason with this counter, if any.
    pub fn from_index(index: u32) -> Option<Self> {
        Self::ALL.get(index as usize).copied()
    }
}
