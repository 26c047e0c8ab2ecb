//! What is measured: one row a line of the report. To add one, add it here.

use lb_common::{
    backend::mode,
    service::{flags, scheduler},
    settings::features,
};

use super::{
    bed::{ServiceSpec, Slots},
    frame::{Family, Kind},
    wrapper::Variety,
};
use crate::dataplane::Tables;

/// What a row feeds to which program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A client's packet to a service of the ingress program (or to several alike).
    Service(ServiceSpec, Kind),
    /// A packet of the ingress host's own, which is none of the balancer's business.
    NotVip(Family),
    /// An established v4 segment to the plain balancer, which is there to compare with.
    Plain,
    /// An encapsulated packet to the decap program: the inner family, GUE or not.
    Decap(Family, bool),
    /// A v4 client's packet to a service, while so many blocks of 256 addresses are denied; and whether the client is.
    /// Only where the program has such lists.
    Guarded(ServiceSpec, u32, Listed),
    /// A packet with a second chance, for a flow that the worker has no socket for: it goes on to the next.
    Chance(Family),
    /// One that comes to the last worker of its chain, the second, which has a socket for the flow.
    ChanceHere(Family),
}

/// Whether a client is on the deny list, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// It is not.
    No,
    /// With the block of 256 addresses that it is in.
    Block,
    /// By its address, like each of the others.
    Address,
}

/// A row.
#[derive(Clone, Debug)]
pub struct Row {
    /// Heading under which it stands.
    pub section: &'static str,
    /// Its name, the same in every run.
    pub name: String,
    /// Maps that it needs. Rows with the same ones share a loaded program and are interleaved.
    pub tables: Tables,
    /// What it feeds.
    pub subject: Subject,
    /// Flows that take turns, a power of two.
    pub flows: u32,
    /// Rounds before the first that counts: so many that every flow is known. For a scheduler that places by SYNs each flow
    /// has its SYN first.
    pub prime: u32,
    /// Where it stands on a curve of growth.
    pub growth: Option<Growth>,
}

/// A point of a curve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Growth {
    /// The curve.
    pub curve: &'static str,
    /// How many there are.
    pub x: u32,
}

impl Row {
    /// What changes from round to round.
    pub fn variety(&self) -> Variety {
        let vips = match self.subject {
            Subject::Service(spec, _) => spec.services,
            _ => 1,
        };
        Variety { flows: self.flows, vips }
    }

    /// Whether a quick run has it: what something is claimed about, and of the rest what differs most and needs few maps
    /// of its own, because loading the programs takes longer than their packets.
    pub fn is_quick(&self) -> bool {
        match self.growth {
            Some(Growth { curve: "flows", x }) => [ONE, 1 << 12, MILLION, SIXTEEN_MILLION].contains(&x),
            Some(Growth { curve: "backends", .. }) => true,
            Some(Growth { curve: "deny", .. }) => false,
            Some(Growth { x, .. }) => [1, 4_096].contains(&x),
            None => {
                let rare = ["/l2/", "/tracked/", "limited/", "denied-address", "v6/udp-tracked", "gue-chain"];
                // Flows that have to be made first, one by one, and about which nothing is claimed.
                let made = ["p2c/v6/", "every-feature/v6/", "tcp-syn/nat/1M", "udp/nat/1M"];
                // One flow is the floor of what a million cost: shown once.
                let is_floor = self.flows == ONE
                    && (self.section == STABLE || self.name.starts_with("plain/"))
                    && self.name != "v4/tcp-established/ipip/1";
                let has_any = |texts: &[&str]| texts.iter().any(|text| self.name.contains(text));
                let is_twin = self.name.starts_with("v6/") && has_any(&["/nat/", "/transition/"]);
                let is_left_out = is_floor || is_twin || has_any(&rare) || has_any(&made);
                self.flows <= MILLION && !is_left_out
            }
        }
    }
}

const STABLE: &str = "Stable table";
const ONE: u32 = 1;
const MILLION: u32 = 1 << 20;
const SIXTEEN_MILLION: u32 = 1 << 24;

/// Numbers of flows with their names.
const FLOWS: [(u32, &str); 3] = [(ONE, "1"), (MILLION, "1M"), (SIXTEEN_MILLION, "16M")];
/// Forwarding modes with their names.
const MODES: [(u8, &str); 3] = [(mode::IPIP, "ipip"), (mode::GUE, "gue"), (mode::L2, "l2")];

/// Flow tables with room for so many flows and a million more.
const fn roomy(flows: u32) -> u32 {
    if flows < MILLION { 2 * MILLION } else { flows + MILLION }
}

/// All rows.
pub fn all() -> Vec<Row> {
    let mut rows = plain();
    rows.extend(stable());
    rows.extend(every_feature());
    rows.extend(by_load());
    rows.extend(nat());
    rows.extend(mixed());
    rows.extend(echo());
    rows.extend(limited());
    rows.extend(denied());
    rows.extend(not_ours());
    rows.extend(decap());
    rows.extend(tracked_udp());
    rows.extend(exceptions());
    rows.extend(growth());
    rows
}

/// What a balancer without features costs, to compare with v4/tcp-established/ipip.
fn plain() -> Vec<Row> {
    FLOWS
        .into_iter()
        .map(|(flows, flows_name)| Row {
            section: "To compare with: tables and nothing else",
            name: format!("plain/v4/tcp-established/ipip/{flows_name}"),
            tables: Tables::DEFAULT,
            subject: Subject::Plain,
            flows,
            prime: 0,
            growth: None,
        })
        .collect()
}

/// Stable table: the answer needs no flow table.
fn stable() -> Vec<Row> {
    let mut rows = Vec::new();
    for family in Family::ALL {
        for kind in [Kind::Established, Kind::Syn, Kind::Udp] {
            for (mode, mode_name) in MODES {
                for (flows, flows_name) in FLOWS {
                    let spec = ServiceSpec::new(family, mode);
                    let spec = if kind == Kind::Udp {
                        ServiceSpec { flags: flags::UDP_STATELESS, ..spec.udp() }
                    } else {
                        spec
                    };
                    rows.push(Row {
                        section: STABLE,
                        name: format!("{}/{}/{mode_name}/{flows_name}", family.label(), kind.label()),
                        tables: Tables::DEFAULT,
                        subject: Subject::Service(spec, kind),
                        flows,
                        prime: 0,
                        growth: None,
                    });
                }
            }
        }
    }
    rows
}

/// The program with all that it can have: lists (on which no client is), limits, users' programs. What `lbd` loads for the
/// other rows leaves out those of the three that nobody uses.
fn every_feature() -> Vec<Row> {
    let mut rows = Vec::new();
    for family in Family::ALL {
        for kind in [Kind::Established, Kind::Syn] {
            for (flows, flows_name) in [(ONE, "1"), (MILLION, "1M")] {
                rows.push(Row {
                    section: "Stable table, every feature in the program",
                    name: format!("every-feature/{}/{}/ipip/{flows_name}", family.label(), kind.label()),
                    tables: Tables {
                        used: features::GUARD | features::RATE,
                        chained: true,
                        copy: 2_002,
                        ..Tables::DEFAULT
                    },
                    subject: Subject::Service(ServiceSpec::new(family, mode::IPIP), kind),
                    flows,
                    prime: 0,
                    growth: None,
                });
            }
        }
    }
    rows
}

/// New flows of a service that limits each client's; none of them is refused.
fn limited() -> Vec<Row> {
    Family::ALL
        .into_iter()
        .flat_map(|family| [Kind::Established, Kind::Syn].map(|kind| (family, kind)))
        .map(|(family, kind)| Row {
            section: "New flows limited by source",
            name: format!("limited/{}/{}/ipip/1M", family.label(), kind.label()),
            tables: Tables { used: features::RATE, copy: 2_003, ..Tables::DEFAULT },
            subject: Subject::Service(
                ServiceSpec { flags: flags::LIMIT_SOURCES, ..ServiceSpec::new(family, mode::IPIP) },
                kind,
            ),
            flows: MILLION,
            prime: 0,
            growth: None,
        })
        .collect()
}

/// Placed by load: every packet looks for its flow first, and new ones compare two loads. Established flows have had their
/// handshake, so that those of second choices stand in the flow table; each SYN is a new flow's, and noted. In GUE packets
/// name the other half of their pair.
fn by_load() -> Vec<Row> {
    let modes = [(mode::IPIP, "ipip", 0), (mode::GUE_CHAIN, "gue-chain", flags::SECOND_CHANCE)];
    let mut rows = Vec::new();
    for family in Family::ALL {
        for kind in [Kind::Established, Kind::Syn] {
            for (mode, mode_name, more) in modes {
                for (flows, flows_name) in [(ONE, "1"), (MILLION, "1M")] {
                    let spec = ServiceSpec {
                        scheduler: scheduler::P2C,
                        flags: flags::TRACK_ALL | more,
                        // A SYN on a flow that lives would follow it, and note nothing.
                        number: kind as u32,
                        ..ServiceSpec::new(family, mode)
                    };
                    rows.push(Row {
                        section: "Placed by load",
                        name: format!("p2c/{}/{}/{mode_name}/{flows_name}", family.label(), kind.label()),
                        // A million flows each: half of them stand in the table.
                        tables: Tables {
                            copy: 2_100 + 2 * family as u32 + u32::from(more != 0),
                            ..Tables::DEFAULT
                        },
                        subject: Subject::Service(spec, kind),
                        flows,
                        prime: if kind == Kind::Established { flows } else { 0 },
                        growth: None,
                    });
                }
            }
        }
    }
    rows
}

/// Translated: every packet finds its flow's binding, which the first rounds have made. (16 M bindings would take 5 GB.)
fn nat() -> Vec<Row> {
    let mut rows = Vec::new();
    for family in Family::ALL {
        for kind in [Kind::Established, Kind::Syn, Kind::Udp] {
            for (flows, flows_name) in [(ONE, "1"), (MILLION, "1M")] {
                let spec = ServiceSpec { flags: flags::NAT, ..ServiceSpec::new(family, mode::NAT) };
                let spec = if kind == Kind::Udp { spec.udp() } else { spec };
                // All kinds of a family share its bindings' map, by service.
                let tables = Tables { nat_flows: 4 * MILLION, copy: family as u32, ..Tables::DEFAULT };
                rows.push(Row {
                    section: "Translated",
                    name: format!("{}/{}/nat/{flows_name}", family.label(), kind.label()),
                    tables,
                    subject: Subject::Service(spec, kind),
                    flows,
                    prime: flows,
                    growth: None,
                });
            }
        }
    }
    rows
}

/// Answered by a stage of its own.
fn echo() -> Vec<Row> {
    Family::ALL
        .into_iter()
        .map(|family| Row {
            section: "ICMP",
            name: format!("{}/icmp-echo/1", family.label()),
            tables: Tables { copy: 2_001, ..Tables::DEFAULT },
            subject: Subject::Service(ServiceSpec::new(family, mode::L2), Kind::Echo),
            flows: ONE,
            prime: 0,
            growth: None,
        })
        .collect()
}

/// Outer header of the other family.
fn mixed() -> Vec<Row> {
    let others = [(Family::V4, Family::V6), (Family::V6, Family::V4)];
    others
        .into_iter()
        .map(|(family, outer)| Row {
            section: "Outer header of the other family",
            name: format!("{}/tcp-established/ipip-over-{}/1M", family.label(), outer.label()),
            tables: Tables { copy: 2_001, ..Tables::DEFAULT },
            subject: Subject::Service(
                ServiceSpec { outer, ..ServiceSpec::new(family, mode::IPIP) },
                Kind::Established,
            ),
            flows: MILLION,
            prime: 0,
            growth: None,
        })
        .collect()
}

/// Clients that are on the deny list, and others while it grows.
fn denied() -> Vec<Row> {
    let spec = ServiceSpec::new(Family::V4, mode::IPIP);
    let row = |copy: u32, name: String, blocks: u32, listed: Listed| Row {
        section: "Deny list",
        name,
        tables: Tables {
            // Without a list the program has nothing to ask it, as `lbd` loads it.
            used: if blocks == 0 { 0 } else { features::GUARD },
            copy: 1_000 + copy,
            ..Tables::DEFAULT
        },
        subject: Subject::Guarded(spec, blocks, listed),
        flows: MILLION,
        prime: 0,
        growth: (listed == Listed::No).then_some(Growth { curve: "deny", x: blocks }),
    };
    let steps = [0, 1 << 10, 1 << 15, MILLION];
    let mut rows = vec![
        row(0, "v4/denied/1M".to_owned(), MILLION, Listed::Block),
        // As many as there is room for beside the clients' own.
        row(5, "v4/denied-address/1M".to_owned(), MILLION - MILLION / 16, Listed::Address),
    ];
    rows.extend(
        (1..).zip(steps).map(|(copy, blocks)| row(copy, format!("growth/deny/{blocks}"), blocks, Listed::No)),
    );
    rows
}

/// Packets that are passed to the host.
fn not_ours() -> Vec<Row> {
    Family::ALL
        .into_iter()
        .map(|family| Row {
            section: "Passed to the host",
            name: format!("{}/not-vip/1M", family.label()),
            tables: Tables::DEFAULT,
            subject: Subject::NotVip(family),
            flows: MILLION,
            prime: 0,
            growth: None,
        })
        .collect()
}

/// The worker's side.
fn decap() -> Vec<Row> {
    let mut rows = Vec::new();
    for family in Family::ALL {
        for (gue, name) in [(false, "ipip"), (true, "gue")] {
            rows.push(Row {
                section: "Decapsulation on the worker",
                name: format!("{}/decap/{name}/1", family.label()),
                tables: Tables::DEFAULT,
                subject: Subject::Decap(family, gue),
                flows: ONE,
                prime: 0,
                growth: None,
            });
        }
        for (subject, name) in
            [(Subject::Chance(family), "gue-sent-on"), (Subject::ChanceHere(family), "gue-second-chance")]
        {
            rows.push(Row {
                section: "Decapsulation on the worker",
                name: format!("{}/decap/{name}/1", family.label()),
                tables: Tables::DEFAULT,
                subject,
                flows: ONE,
                prime: 0,
                growth: None,
            });
        }
    }
    rows
}

/// UDP flows are remembered: all of them stand in the table, which the first rounds have filled.
fn tracked_udp() -> Vec<Row> {
    let mut rows = Vec::new();
    for family in Family::ALL {
        for (flows, flows_name) in FLOWS {
            rows.push(Row {
                section: "UDP, tracked (all flows are in the table)",
                name: format!("{}/udp-tracked/ipip/{flows_name}", family.label()),
                tables: Tables { udp_flows: roomy(flows), copy: family as u32, ..Tables::DEFAULT },
                subject: Subject::Service(ServiceSpec::new(family, mode::IPIP).udp(), Kind::Udp),
                flows,
                prime: flows,
                growth: None,
            });
        }
    }
    rows
}

/// Tables with exceptions. Established flows of a transition are written down at their first packet.
fn exceptions() -> Vec<Row> {
    let mut rows = Vec::new();
    for (slots, state) in [(Slots::Transition, "transition"), (Slots::Tracked, "tracked")] {
        for family in Family::ALL {
            for kind in [Kind::Established, Kind::Syn] {
                for (flows, flows_name) in FLOWS {
                    let spec =
                        ServiceSpec { slots, number: kind as u32, ..ServiceSpec::new(family, mode::IPIP) };
                    let tables = Tables { flows: roomy(flows), copy: family as u32, ..Tables::DEFAULT };
                    let is_recorded = slots == Slots::Transition && kind == Kind::Established;
                    rows.push(Row {
                        section: "Table with exceptions",
                        name: format!("{}/{}/ipip/{state}/{flows_name}", family.label(), kind.label()),
                        tables,
                        subject: Subject::Service(spec, kind),
                        flows,
                        prime: if is_recorded { flows } else { 0 },
                        growth: None,
                    });
                }
            }
        }
    }
    rows
}

/// What the dataplane should not notice. All are established v4 flows over ipip.
fn growth() -> Vec<Row> {
    const STEPS: [u32; 5] = [1, 8, 64, 512, 4_096];
    const FLOW_STEPS: [u32; 7] = [1, 16, 1 << 8, 1 << 12, 1 << 16, MILLION, SIXTEEN_MILLION];
    let spec = ServiceSpec::new(Family::V4, mode::IPIP);
    let small = ServiceSpec { backends: 4, slot_count: lb_common::limits::TABLE_SIZES[0], ..spec };
    let row = |curve: &'static str, x: u32, spec, flows, tables| Row {
        section: "Growth",
        name: format!("growth/{curve}/{x}"),
        tables,
        subject: Subject::Service(spec, Kind::Established),
        flows,
        prime: 0,
        growth: Some(Growth { curve, x }),
    };
    let default = Tables { copy: 3_000, ..Tables::DEFAULT };
    let mut rows = Vec::new();
    for x in STEPS {
        let others = Tables { other_services: x - 1, ..default };
        rows.push(row("services-one-busy", x, spec, MILLION, others));
    }
    for x in STEPS {
        let own = Tables { copy: x, ..default };
        rows.push(row("services-all-busy", x, ServiceSpec { services: x, ..small }, MILLION, own));
    }
    for x in STEPS {
        rows.push(row("backends", x, ServiceSpec { backends: x, ..spec }, MILLION, default));
    }
    for x in FLOW_STEPS {
        rows.push(row("flows", x, spec, x, default));
    }
    rows
}
