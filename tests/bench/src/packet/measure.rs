//! Measures rows: each next to the bare wrapper and the floor, round by round, in turn.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap},
    programs::{ProgramFd, Xdp},
};
use lb_common::{
    Address, Reason, ServiceKey,
    service::{TCP, scheduler},
};

use super::{
    bed::{Bed, PORT, ServiceSpec},
    frame::{Family, Frame, Kind},
    rows::{Listed, Row, Subject},
    wrapper::{DROP, PASS, TX, Wrapper},
};
use crate::{
    dataplane::{Decap, Tables, load_xdp},
    objects,
};

/// The dataplane's form of an address.
fn to_address(address: IpAddr) -> Address {
    match address {
        IpAddr::V4(address) => lb_common::mapped(address.octets()),
        IpAddr::V6(address) => address.octets(),
    }
}

/// How much to measure.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Times that each row is measured.
    pub samples: usize,
    /// Packets of a sample.
    pub packets: u32,
}

/// Times per packet of one row, one a sample, in nanoseconds, wrapper included.
#[derive(Clone, Debug)]
pub struct Samples {
    /// The row's.
    pub row: Vec<f64>,
    /// The bare XDP_TX in the same wrapper, in the same turn.
    pub bare: Vec<f64>,
    /// The floor likewise.
    pub floor: Vec<f64>,
    /// An older object's, where one was given.
    pub before: Option<Vec<f64>>,
}

/// A program in a wrapper, and what was measured.
struct Case {
    wrapper: Wrapper,
    /// Runs of a sample, of which the least counts.
    runs: usize,
    samples: Vec<f64>,
}

impl Case {
    fn new(wrapper: Wrapper) -> Self {
        Self { wrapper, runs: 1, samples: Vec::new() }
    }

    /// What many rows are compared with: a disturbance would be in all of them.
    fn reference(wrapper: Wrapper) -> Self {
        Self { runs: 3, ..Self::new(wrapper) }
    }

    fn sample(&mut self, packets: u32) -> Result<()> {
        // Brings caches and branch predictors back to this case.
        self.wrapper.run(packets / 8)?;
        let mut least = f64::INFINITY;
        for _ in 0..self.runs {
            least = least.min(self.wrapper.run(packets)?.ns);
        }
        self.samples.push(least);
        Ok(())
    }
}

/// A wrapper's shape: rows of the same shape share the bare one and the floor.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    len: usize,
    headers: usize,
    source_at: usize,
    many: bool,
    vips: u32,
}

/// Measures rows that share their maps. The result is in the order of `rows`.
pub fn measure(rows: &[&Row], object: &[u8], before: Option<&[u8]>, effort: Effort) -> Result<Vec<Samples>> {
    let Some(first) = rows.first() else { return Ok(Vec::new()) };
    let mut bed = Programs::load(object, first.tables)?;
    let mut old_bed = before.map(|object| Programs::load(object, first.tables)).transpose()?;
    let references = References::load()?;
    let mut shapes: Vec<(Shape, usize)> = Vec::new();
    let mut cases: Vec<Case> = Vec::new();
    let mut places = Vec::new();
    for row in rows {
        let (frame, case) = bed.case(row).with_context(|| format!("row {}", row.name))?;
        let shape = Shape {
            len: frame.bytes.len(),
            headers: frame.headers,
            source_at: frame.source_at,
            many: row.flows > 1,
            vips: row.variety().vips,
        };
        let reference = match shapes.iter().find(|(known, _)| *known == shape) {
            Some((_, place)) => *place,
            None => {
                shapes.push((shape, cases.len()));
                for program in [&references.bare, &references.floor] {
                    cases.push(Case::reference(Wrapper::new(&frame, row.variety(), program)?));
                }
                cases.len() - 2
            }
        };
        let own = cases.len();
        cases.push(case);
        let old = match &mut old_bed {
            Some(bed) => {
                cases.push(bed.case(row).with_context(|| format!("row {} before", row.name))?.1);
                Some(own + 1)
            }
            None => None,
        };
        places.push((reference, own, old));
    }
    bed.bed.ingress.settle_filter()?;
    for turn in 0..effort.samples {
        // Each turn begins elsewhere, so that no case always follows the same one.
        let start = turn * cases.len() / effort.samples;
        for i in 0..cases.len() {
            let place = (start + i) % cases.len();
            cases[place].sample(effort.packets)?;
        }
    }
    Ok(places
        .into_iter()
        .map(|(reference, own, old)| Samples {
            row: cases[own].samples.clone(),
            bare: cases[reference].samples.clone(),
            floor: cases[reference + 1].samples.clone(),
            before: old.map(|old| cases[old].samples.clone()),
        })
        .collect())
}

/// The programs to compare with.
struct References {
    _bpf: Ebpf,
    bare: ProgramFd,
    floor: ProgramFd,
}

impl References {
    fn load() -> Result<Self> {
        let mut bpf = EbpfLoader::new().load(objects::REWIND).context("load the reference programs")?;
        let mut fd = |name| -> Result<ProgramFd> {
            let program: &mut Xdp = load_xdp(&mut bpf, name)?;
            Ok(program.fd()?.try_clone()?)
        };
        let (bare, floor) = (fd("bare")?, fd("floor")?);
        Ok(Self { _bpf: bpf, bare, floor })
    }
}

/// The loaded programs of a group of rows.
struct Programs {
    bed: Bed,
    /// These two from their first row on: most groups have none.
    decap: Option<Decap>,
    plain: Option<Plain>,
    /// Flows that the worker has sockets for.
    connections: Vec<[TcpStream; 2]>,
}

/// The plain balancer.
struct Plain {
    _bpf: Ebpf,
    program: ProgramFd,
}

impl Plain {
    const SLOTS: u32 = lb_common::limits::TABLE_SIZE;
    const BACKENDS: u32 = 1_000;

    fn vip() -> Address {
        Family::V4.address(8, 1)
    }

    fn load() -> Result<Self> {
        let mut bpf = EbpfLoader::new().load(objects::REWIND).context("load the plain balancer")?;
        let program = load_xdp(&mut bpf, "plain")?.fd()?.try_clone()?;
        let key = ServiceKey { vip: Self::vip(), port: PORT.into(), protocol: TCP, pad: 0 };
        HashMap::try_from(bpf.map_mut("SERVICES").context("map SERVICES")?)?.insert(key, 1u32, 0)?;
        let mut slots: Array<_, u32> = Array::try_from(bpf.map_mut("SLOTS").context("map SLOTS")?)?;
        for i in 0..Self::SLOTS {
            // As in no order as ours are: the golden ratio again.
            slots.set(i, (i.wrapping_mul(0x9e37_79b9) >> 8) % Self::BACKENDS, 0)?;
        }
        let mut backends: Array<_, u32> = Array::try_from(bpf.map_mut("BACKENDS").context("map BACKENDS")?)?;
        for i in 0..Self::BACKENDS {
            backends.set(i, 0x0a01_0000 + i, 0)?;
        }
        Ok(Self { _bpf: bpf, program })
    }
}

impl Programs {
    fn load(object: &[u8], tables: Tables) -> Result<Self> {
        Ok(Self { bed: Bed::load(object, tables)?, decap: None, plain: None, connections: Vec::new() })
    }

    fn decap(&mut self) -> Result<&Decap> {
        if self.decap.is_none() {
            let addresses = |high| Family::ALL.map(|family| family.address(high, 1));
            let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()].map(to_address);
            self.decap = Some(Decap::load(&addresses(10), &[addresses(7), loopback].concat())?);
        }
        Ok(self.decap.as_ref().expect("it has just been put there"))
    }

    fn plain(&mut self) -> Result<&Plain> {
        if self.plain.is_none() {
            self.plain = Some(Plain::load()?);
        }
        Ok(self.plain.as_ref().expect("it has just been put there"))
    }

    /// The row's frame, and its program in a wrapper: checked to do what the row says, and primed.
    fn case(&mut self, row: &Row) -> Result<(Frame, Case)> {
        let (frame, program, verdict, grown) = match row.subject {
            Subject::Service(spec, kind) => {
                let vip = self.bed.vip(&spec)?;
                let frame = Frame::new(spec.family, kind, vip, PORT);
                (frame, self.bed.ingress.fd()?, TX, spec.overhead())
            }
            Subject::Plain => {
                let frame = Frame::new(Family::V4, Kind::Established, Plain::vip(), PORT);
                (frame, self.plain()?.program.try_clone()?, TX, 20)
            }
            Subject::NotVip(family) => {
                let frame = Frame::new(family, Kind::Established, family.address(250, 1), PORT);
                (frame, self.bed.ingress.fd()?, PASS, 0)
            }
            Subject::Guarded(spec, blocks, listed) => {
                let vip = self.bed.vip(&spec)?;
                self.bed.ingress.deny(blocks, listed, row.flows)?;
                let frame = Frame::new(spec.family, Kind::Established, vip, PORT);
                let (verdict, grown) = if listed == Listed::No { (TX, spec.overhead()) } else { (DROP, 0) };
                (frame, self.bed.ingress.fd()?, verdict, grown)
            }
            Subject::Chance(family) => {
                let inner = Frame::new(family, Kind::Established, family.address(7, 1), PORT);
                let (worker, next) = (family.address(10, 1), family.address(10, 2));
                let port = lb_common::settings::GUE_PORT;
                (inner.chained(family.address(0, 9), worker, Some(next), port), self.decap()?.fd()?, TX, 0)
            }
            Subject::ChanceHere(family) => {
                let (client, vip) = self.connected(family)?;
                let inner = Frame::of_flow(family, Kind::Established, client, vip);
                let port = lb_common::settings::GUE_PORT;
                let frame = inner.chained(family.address(10, 2), family.address(10, 1), None, port);
                let overhead = frame.bytes.len() - inner.bytes.len();
                (frame, self.decap()?.fd()?, PASS, -(overhead as i32))
            }
            Subject::Decap(family, gue) => {
                let inner = Frame::new(family, Kind::Established, family.address(7, 1), PORT);
                let gue = gue.then_some(lb_common::settings::GUE_PORT);
                let frame = inner.encapsulated(family.address(0, 9), family.address(10, 1), gue);
                let overhead = frame.bytes.len() - inner.bytes.len();
                (frame, self.decap()?.fd()?, PASS, -(overhead as i32))
            }
        };
        let wrapper = Wrapper::new(&frame, row.variety(), &program)?;
        // Once, and often: the wrapper must hand the program the same frame each time.
        for rounds in CHECKS {
            let run = wrapper.run(rounds)?;
            let expected = (verdict, frame.bytes.len() as i32 + grown);
            ensure!(
                (run.verdict, run.len as i32) == expected,
                "verdict and length after {rounds} rounds are ({}, {}), not {expected:?}",
                run.verdict,
                run.len
            );
        }
        if let Subject::ChanceHere(_) = row.subject {
            // The last of a chain takes what nobody knows, too.
            let decap = self.decap()?;
            let (had, unknown) = (decap.count(Reason::ChanceSecond)?, decap.count(Reason::ChanceNone)?);
            ensure!(had > 0 && unknown == 0, "{had} packets found their socket, {unknown} found none");
        }
        let case = Case::new(wrapper);
        match row.subject {
            Subject::Service(spec, Kind::Established) if spec.scheduler != scheduler::MAGLEV => {
                self.handshakes(row, spec, &case)?;
            }
            _ if row.prime > 0 => drop(case.wrapper.run(row.prime)?),
            _ => {}
        }
        Ok((frame, case))
    }

    /// Both ends of a connection over the loopback interface, which lasts as long as the programs: client's and VIP's.
    fn connected(&mut self, family: Family) -> Result<((Address, u16), (Address, u16))> {
        let loopback = match family {
            Family::V4 => IpAddr::from(Ipv4Addr::LOCALHOST),
            Family::V6 => Ipv6Addr::LOCALHOST.into(),
        };
        let listener = TcpListener::bind((loopback, 0)).context("listen on the loopback interface")?;
        let client = TcpStream::connect(listener.local_addr()?).context("connect over it")?;
        let (accepted, _) = listener.accept()?;
        let end = |address: SocketAddr| (to_address(address.ip()), address.port());
        let ends = (end(accepted.peer_addr()?), end(accepted.local_addr()?));
        self.connections.push([client, accepted]);
        Ok(ends)
    }

    /// Lets every flow begin: its SYN, then the packet that completes the handshake.
    fn handshakes(&mut self, row: &Row, spec: ServiceSpec, case: &Case) -> Result<()> {
        /// Fewer than SYNs are noted at once.
        const AT_ONCE: u32 = 1 << 16;
        let frame = Frame::new(spec.family, Kind::Syn, self.bed.vip(&spec)?, PORT);
        let syns = Wrapper::new(&frame, row.variety(), &self.bed.ingress.fd()?)?;
        // Where the other wrapper is by now in the order of the flows.
        for rounds in CHECKS {
            syns.run(rounds)?;
        }
        for _ in 0..row.prime.div_ceil(AT_ONCE) {
            syns.run(row.prime.min(AT_ONCE))?;
            case.wrapper.run(row.prime.min(AT_ONCE))?;
        }
        Ok(())
    }
}

/// Rounds after which a row's verdict and length are looked at.
const CHECKS: [u32; 2] = [1, 1_000];
