//! What is measured: one row a line of the report. To add one, add it here.

use lb_common::{
    backend::mode,
    service::{flags, scheduler},
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
    /// A v4 client's packet to a service that lists so many blocks of 256 addresses as denied; the client's own among
    /// them or not. Only where the program has such lists.
    Guarded(ServiceSpec, u32, bool),
    /// A packet with a second chance, for a flow that the worker has no socket for: it goes on to the next.
    Chance(Family),
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
    /// Rounds before the first that counts: so many that every flow is known.
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
}

const ONE: u32 = 1;
const MILLION: u32 = 1 << 20;
const SIXTEEN_MILLION: u32 = 1 << 24;

/// Numbers of flows with their names.
const FLOWS: [(u32, &str); 3] = [(ONE, "1"), (MILLION, "1M"), (SIXTEEN_MILLION, "16M")];
/// Forwarding modes with their names.
const MODES: [(u8, &str); 3] = [(mode::IPIP, "ipip"), (mode::GUE, "gue"), (mode::L2, "l2")];

/// Flow tables with room for a million flows and as many again.
const ROOMY: u32 = 2 * MILLION;

/// All rows.
pub fn all() -> Vec<Row> {
    let mut rows = plain();
    rows.extend(stable());
    rows.extend(by_load());
    rows.extend(nat());
    rows.extend(mixed());
    rows.extend(echo());
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
                        section: "Stable table",
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

/// Placed by load: every packet looks for its flow first, and new ones compare two loads. In GUE packets name the other
/// half of their pair.
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
                        ..ServiceSpec::new(family, mode)
                    };
                    rows.push(Row {
                        section: "Placed by load",
                        name: format!("p2c/{}/{}/{mode_name}/{flows_name}", family.label(), kind.label()),
                        tables: Tables { copy: 2_000, ..Tables::DEFAULT },
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
    let row = |copy: u32, name: String, listed: u32, hit: bool| Row {
        section: "Deny list",
        name,
        tables: Tables { copy: 1_000 + copy, ..Tables::DEFAULT },
        subject: Subject::Guarded(spec, listed, hit),
        flows: MILLION,
        prime: 0,
        growth: (!hit).then_some(Growth { curve: "deny", x: listed }),
    };
    let steps = [0, 1 << 10, 1 << 15, MILLION];
    let mut rows = vec![row(0, "v4/denied/1M".to_owned(), MILLION, true)];
    rows.extend(
        (1..).zip(steps).map(|(copy, listed)| row(copy, format!("growth/deny/{listed}"), listed, false)),
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
        rows.push(Row {
            section: "Decapsulation on the worker",
            name: format!("{}/decap/gue-sent-on/1", family.label()),
            tables: Tables::DEFAULT,
            subject: Subject::Chance(family),
            flows: ONE,
            prime: 0,
            growth: None,
        });
    }
    rows
}

/// UDP flows are remembered. The last number of flows does not fit the table: each packet evicts one.
fn tracked_udp() -> Vec<Row> {
    let mut rows = Vec::new();
    for family in Family::ALL {
        for (flows, flows_name) in FLOWS {
            rows.push(Row {
                section: "UDP, tracked (table of 2 M flows)",
                name: format!("{}/udp-tracked/ipip/{flows_name}", family.label()),
                tables: Tables { udp_flows: ROOMY, ..Tables::DEFAULT },
                subject: Subject::Service(ServiceSpec::new(family, mode::IPIP).udp(), Kind::Udp),
                flows,
                prime: flows.min(2 * MILLION),
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
                    let spec = ServiceSpec { slots, ..ServiceSpec::new(family, mode::IPIP) };
                    let tables = Tables { flows: ROOMY, copy: family as u32, ..Tables::DEFAULT };
                    let is_recorded = slots == Slots::Transition && kind == Kind::Established;
                    rows.push(Row {
                        section: "Table with exceptions (flow table of 2 M flows)",
                        name: format!("{}/{}/ipip/{state}/{flows_name}", family.label(), kind.label()),
                        tables,
                        subject: Subject::Service(spec, kind),
                        flows,
                        prime: if is_recorded { flows.min(2 * MILLION) } else { 0 },
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
