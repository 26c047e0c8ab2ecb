//! One case of the ingress program: what is in the tables, a packet, and all that must come of it.

use lb_common::{
    Address, Backend, BackendStats, Be16, Flow, FlowKey, Reason, ServiceKey, ServiceView,
    backend::{flags, mode},
    mapped, names,
    service::{TCP, UDP},
    settings::IngressSettings,
};
use std::sync::{Mutex, OnceLock, PoisonError};
use test_packet::{Ingress, Packet, Pair, SEQUENCE, Vlan, bed, outer, xdp};

/// The IPv4 VIP.
pub const VIP4: Address = mapped([192, 0, 2, 1]);
/// The IPv6 VIP.
pub const VIP6: Address = v6(0, 1);
/// A client.
pub const CLIENT4: Address = mapped([198, 51, 100, 7]);
/// A client.
pub const CLIENT6: Address = v6(0xc, 7);
/// The client's port.
pub const PORT: u16 = 40_001;
/// Index of the case's service.
pub const SERVICE: u32 = 1;

pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;
pub const FIN: u8 = 0x11;
pub const RST: u8 = 0x04;

/// An address of 2001:db8::/32.
pub const fn v6(a: u8, b: u8) -> Address {
    [0x20, 1, 0x0d, 0xb8, 0, a, 0, 0, 0, 0, 0, 0, 0, 0, 0, b]
}

/// Makes each row a test of its own.
macro_rules! cases {
    ($($(#[$meta:meta])* $name:ident: $case:expr;)+) => { $(
        $(#[$meta])*
        #[test]
        fn $name() {
            $case.check();
        }
    )+ };
}
pub(crate) use cases;

/// Family of an IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// Which of the loaded programs a case runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// Everything on.
    Default,
    /// IPv6, tags and counters off; no ICMP.
    Off,
    /// No features: what every deployment needs, and nothing else.
    Plain,
    /// At most two ICMP messages at once.
    FewAnswers,
    /// Outer TTL 9.
    LowTtl,
}

/// Runs `f` on the loaded program with empty tables, inside the test bed.
pub fn with<R>(loaded: Loaded, f: impl FnOnce(&mut Ingress) -> R) -> R {
    static PROGRAMS: [OnceLock<Mutex<Ingress>>; 5] = [const { OnceLock::new() }; 5];
    bed::enter();
    let all = IngressSettings::DEFAULT;
    let settings = match loaded {
        Loaded::Default => all,
        Loaded::Off => IngressSettings { ipv6: 0, vlan: 0, stats: 0, icmp_per_s: 0, ..all },
        Loaded::Plain => IngressSettings { features: 0, ..all },
        Loaded::FewAnswers => IngressSettings { icmp_per_s: 1, icmp_burst: 2, ..all },
        Loaded::LowTtl => IngressSettings { outer_ttl: 9, ..all },
    };
    let program = PROGRAMS[loaded as usize].get_or_init(|| {
        let mut ingress = Ingress::load(settings).expect("the program loads");
        ingress.egress(bed::EGRESS);
        Mutex::new(ingress)
    });
    // A case that failed leaves the tables as they were; they are emptied anyway.
    let mut program = program.lock().unwrap_or_else(PoisonError::into_inner);
    program.reset();
    f(&mut program)
}

/// A backend of the case's service, reached through the interface that packets come in by.
pub fn backend(index: u32, mode: u8, family: Family) -> Backend {
    let (address, source, bits) = match family {
        Family::V4 => (mapped([10, 1, 0, index as u8]), mapped([10, 9, 0, 0]), 16),
        Family::V6 => (v6(1, index as u8), v6(2, 0), 40),
    };
    Backend {
        address,
        source,
        next_hop: [2, 0, 0, 0, 1, index as u8],
        mtu: 0,
        egress_mac: [2, 0, 0, 0, 0, 1],
        vlan: Be16::new(0),
        ifindex: bed::INGRESS,
        flags: flags::USED | flags::RESOLVED,
        mode,
        source_bits: if mode == mode::GUE { 0 } else { bits },
        port: Be16::new(6080),
        service: SERVICE,
    }
}

/// A TCP packet of the client to port 80 of the VIP.
pub fn tcp(family: Family, tcp_flags: u8) -> Packet {
    Packet { flags: tcp_flags, ..to(family, TCP, 80) }
}

/// A UDP packet of the client to port 53 of the VIP.
pub fn udp(family: Family) -> Packet {
    to(family, UDP, 53)
}

/// A packet of the client to the VIP.
pub fn to(family: Family, protocol: u8, port: u16) -> Packet {
    match family {
        Family::V4 => Packet::new(protocol, (CLIENT4, PORT), (VIP4, port)),
        Family::V6 => Packet::new(protocol, (CLIENT6, PORT), (VIP6, port)),
    }
}

/// A packet whose IP length is `len`.
pub fn sized(mut packet: Packet, len: usize) -> Packet {
    let headers = packet.ip().len() - packet.payload.len();
    packet.payload = (0..len - headers).map(|i| (i % 251) as u8).collect();
    packet
}

/// A flow-table entry of the packet's flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub table: &'static str,
    pub backend: u32,
    pub flags: u32,
    /// Whether it was last seen now, or else long ago.
    pub is_fresh: bool,
}

/// A case.
pub struct Case {
    pub loaded: Loaded,
    pub packet: Packet,
    /// What is sent, if it is not the packet's bytes.
    pub bytes: Option<Vec<u8>>,
    pub view: ServiceView,
    pub pairs: Vec<Pair>,
    pub backends: Vec<(u32, Backend)>,
    pub before: Vec<(Entry, u32)>,
    pub setup: Option<fn(&mut Ingress)>,
    pub verdict: u32,
    pub frame: Vec<u8>,
    pub reasons: Vec<(Reason, u64)>,
    pub stats: Vec<(u32, BackendStats)>,
    pub after: Vec<Entry>,
}

impl Case {
    /// A packet to a service whose slots all hold backend 1; nothing is expected yet.
    pub fn new(packet: Packet, backend: Backend) -> Self {
        Self {
            loaded: Loaded::Default,
            packet,
            bytes: None,
            view: Ingress::view(),
            pairs: vec![Pair::Stable(1)],
            backends: vec![(1, backend)],
            before: vec![],
            setup: None,
            verdict: u32::MAX,
            frame: vec![],
            reasons: vec![],
            stats: vec![],
            after: vec![],
        }
    }

    pub fn on(mut self, loaded: Loaded) -> Self {
        self.loaded = loaded;
        self
    }
    pub fn pair(mut self, pair: Pair) -> Self {
        self.pairs = vec![pair];
        self
    }
    pub fn view(mut self, flags: u32) -> Self {
        self.view.flags = flags;
        self
    }
    pub fn backend(mut self, index: u32, backend: Backend) -> Self {
        self.backends.push((index, backend));
        self
    }
    /// Sends these bytes instead of the packet's.
    pub fn sends(mut self, bytes: Vec<u8>) -> Self {
        self.bytes = Some(bytes);
        self
    }
    /// Changes the tables after they were written.
    pub fn setup(mut self, setup: fn(&mut Ingress)) -> Self {
        self.setup = Some(setup);
        self
    }
    /// The flow is in a table, last seen so many seconds ago.
    pub fn knows(mut self, table: &'static str, backend: u32, age_s: u32, flags: u32) -> Self {
        self.before.push((Entry { table, backend, flags, is_fresh: false }, age_s));
        self
    }

    /// The packet goes to this backend out of the interface that it came in by.
    pub fn goes_to(mut self, index: u32, is_new: bool) -> Self {
        let backend = self.backends.iter().find(|(i, _)| *i == index).expect("a backend of the case").1;
        self.verdict = xdp::TX;
        self.frame = outer::encapsulated(&self.packet, &backend);
        let bytes = self.packet.ip().len() as u64;
        self.stats.push((index, BackendStats { packets: 1, bytes, flows: is_new.into() }));
        self
    }
    /// What is sent belongs to the packet's flow, and this IP packet goes to its backend.
    pub fn carried_to(mut self, index: u32, inner: Vec<u8>) -> Self {
        let backend = self.backends.iter().find(|(i, _)| *i == index).expect("a backend of the case").1;
        self.verdict = xdp::TX;
        self.stats.push((index, BackendStats { packets: 1, bytes: inner.len() as u64, flows: 0 }));
        self.frame = [outer::ethernet(&backend), outer::tunnel_of(&self.packet, inner, &backend)].concat();
        self
    }
    /// The packet goes to this backend out of another interface.
    pub fn redirected_to(self, index: u32, is_new: bool) -> Self {
        Self { verdict: xdp::REDIRECT, ..self.goes_to(index, is_new) }
    }
    /// The packet is handed to the host unchanged.
    pub fn passes(mut self, reason: Reason) -> Self {
        self.verdict = xdp::PASS;
        self.frame = self.bytes.clone().unwrap_or_else(|| self.packet.bytes());
        self.counts(reason)
    }
    /// The packet is dropped, and left as it was.
    pub fn drops(self, reason: Reason) -> Self {
        Self { verdict: xdp::DROP, ..self.passes(reason) }
    }
    /// The frame becomes this one, with this verdict.
    pub fn becomes(mut self, verdict: u32, frame: Vec<u8>) -> Self {
        (self.verdict, self.frame) = (verdict, frame);
        self
    }
    /// The sender is told that this size would fit.
    pub fn answers(mut self, mtu: u16) -> Self {
        self.verdict = xdp::TX;
        self.frame = outer::too_big(&self.packet, mtu);
        self.counts(Reason::TooBigAnswered)
    }
    /// This counter is 1 afterwards.
    pub fn counts(mut self, reason: Reason) -> Self {
        self.reasons.push((reason, 1));
        self.reasons.sort();
        self
    }
    /// The flow is in this table afterwards.
    pub fn leaves(mut self, table: &'static str, backend: u32, flags: u32, is_fresh: bool) -> Self {
        self.after.push(Entry { table, backend, flags, is_fresh });
        self
    }

    /// Fills the tables.
    pub fn fill(&self, ingress: &mut Ingress) {
        let (vip, port) = self.packet.destination;
        let protocol = if self.packet.protocol == UDP { UDP } else { TCP };
        let key = ServiceKey { vip, port: Be16::new(port), protocol, pad: 0 };
        ingress.service(SERVICE, key, &self.pairs, self.view);
        for (index, backend) in &self.backends {
            ingress.backend(*index, *backend);
        }
        let now_s = test_packet::now_s();
        for (entry, age_s) in &self.before {
            let flow = Flow {
                backend: entry.backend,
                last_seen_s: now_s - age_s,
                created_s: SEQUENCE,
                flags: entry.flags,
            };
            ingress.set_flow(entry.table, self.key(), flow);
        }
        if let Some(setup) = self.setup {
            setup(ingress);
        }
    }

    /// Key of the packet's flow.
    pub fn key(&self) -> FlowKey {
        FlowKey {
            source: self.packet.source.0,
            source_port: Be16::new(self.packet.source.1),
            port: Be16::new(self.packet.destination.1),
            service: SERVICE,
        }
    }

    /// Runs it.
    pub fn check(self) {
        assert_ne!(self.verdict, u32::MAX, "the case says what is expected");
        with(self.loaded, |ingress| {
            self.fill(ingress);
            let bytes = self.bytes.clone().unwrap_or_else(|| self.packet.bytes());
            let run = ingress.run(&bytes).expect("the kernel runs it");
            self.check_run(ingress, run.verdict, &run.packet);
        });
    }

    fn check_run(&self, ingress: &mut Ingress, verdict: u32, frame: &[u8]) {
        assert_eq!(ingress.counts(), self.reasons, "reasons (verdict {verdict})");
        assert_eq!(verdict, self.verdict, "verdict");
        assert_eq!(frame, self.frame, "the frame afterwards");
        for index in 0..test_packet::USED {
            let expected =
                self.stats.iter().find(|(i, _)| *i == index).map(|(_, stats)| *stats).unwrap_or_default();
            assert_eq!(ingress.stats(index), expected, "counters of backend {index}");
        }
        let now_s = test_packet::now_s();
        let mut after = Vec::new();
        let noted = ingress.flow(names::SYN_CACHE, &self.key());
        assert_eq!(ingress.cached_syns(), usize::from(noted.is_some()), "no other SYN is noted");
        for table in [names::FLOWS, names::SYN_CACHE, names::UDP_FLOWS] {
            let flows = match table {
                names::SYN_CACHE => noted.map(|flow| (self.key(), flow)).into_iter().collect(),
                table => ingress.flows(table),
            };
            for (key, flow) in flows {
                assert_eq!(key, self.key(), "no other flow is in {table}");
                let is_fresh = now_s - flow.last_seen_s <= 1;
                after.push(Entry { table, backend: flow.backend, flags: flow.flags, is_fresh });
            }
        }
        assert_eq!(after, self.after, "flow tables");
    }
}

/// What phase of a flow's life a packet is from, for the matrices of modes, families and tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// TCP: a SYN of a stable slot.
    Syn,
    /// TCP: an established flow of a stable slot.
    Established,
    /// TCP: an established flow whose slot changed its primary.
    Transition,
    /// UDP: a flow's first packet.
    First,
    /// UDP: a flow that is in the table, on another backend than the slot says.
    Known,
    /// UDP: a service without memory.
    Stateless,
}

/// A row of a matrix: a client's packet of one family in a tunnel of another.
pub fn tunnelled(mode: u8, inner: Family, outer: Family, vlan: Vlan, phase: Phase) -> Case {
    use lb_common::service::flags::UDP_STATELESS;
    let packet = match phase {
        Phase::Syn => tcp(inner, SYN),
        Phase::Established | Phase::Transition => tcp(inner, ACK),
        Phase::First | Phase::Known | Phase::Stateless => udp(inner),
    };
    let packet = Packet { vlan, tos: 0xb9, ..packet };
    let case = Case::new(packet, backend(1, mode, outer)).backend(2, backend(2, mode, outer));
    match phase {
        Phase::Syn => case.goes_to(1, true),
        Phase::Established => case.goes_to(1, false),
        Phase::Transition => case
            .pair(Pair::Transition(1, 2))
            .goes_to(2, false)
            .counts(Reason::FlowPromoted)
            .leaves(names::FLOWS, 2, 0, true),
        Phase::First => case.goes_to(1, true).leaves(names::UDP_FLOWS, 1, 0, true),
        Phase::Known => {
            case.knows(names::UDP_FLOWS, 2, 30, 0).goes_to(2, false).leaves(names::UDP_FLOWS, 2, 0, true)
        }
        Phase::Stateless => case.view(UDP_STATELESS).goes_to(1, false),
    }
}
