//! The programs under test, loaded as `lbd` loads them, with services to measure.

use std::{fs, os::fd::AsRawFd};

use anyhow::{Context, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData},
    programs::ProgramFd,
};
use lb_common::{
    Address, Backend, Service, ServiceKey, ServiceView, Slot, Vip, VipKey, backend, names,
    service::{TCP, UDP},
    settings::{DecapSettings, GUE_PORT, IngressSettings},
    slot::{LINE, Line, NO_BACKEND, TRACKED, TRANSITION},
};

use super::{frame::Family, wrapper::load_xdp};
use crate::objects;

/// Sizes of the flow tables, and what else is in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Entries of `FLOWS`.
    pub flows: u32,
    /// Entries of `UDP_FLOWS`.
    pub udp_flows: u32,
    /// Services beside those that are measured.
    pub other_services: u32,
}

impl Tables {
    /// As they ship.
    pub const DEFAULT: Self =
        Self { flows: lb_common::limits::FLOWS, udp_flows: lb_common::limits::UDP_FLOWS, other_services: 0 };
}

/// The state of a service's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slots {
    /// No slot has exceptions.
    Stable,
    /// The primary of every slot changed within the drain time.
    Transition,
    /// It changed earlier; flows of that time may still be in the flow table.
    Tracked,
}

/// A service to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceSpec {
    /// The VIP's family.
    pub family: Family,
    /// [`TCP`] or [`UDP`].
    pub protocol: u8,
    /// Forwarding mode.
    pub mode: u8,
    /// Family of the backends' addresses.
    pub outer: Family,
    /// State of its table.
    pub slots: Slots,
    /// Scheduler.
    pub scheduler: u8,
    /// Flags of the service.
    pub flags: u32,
    /// Backends.
    pub backends: u32,
    /// Slots.
    pub slot_count: u32,
}

impl ServiceSpec {
    /// A stable TCP service of 1,000 backends in a table of the usual size, outer header of the same family.
    pub fn new(family: Family, mode: u8) -> Self {
        Self {
            family,
            protocol: TCP,
            mode,
            outer: family,
            slots: Slots::Stable,
            scheduler: lb_common::service::scheduler::MAGLEV,
            flags: 0,
            backends: 1_000,
            slot_count: lb_common::limits::TABLE_SIZE,
        }
    }

    /// The same for UDP.
    pub fn udp(self) -> Self {
        Self { protocol: UDP, ..self }
    }

    /// Bytes that forwarding adds in front of the frame.
    pub fn overhead(&self) -> i32 {
        let outer = if self.outer == Family::V4 { 20 } else { 40 };
        match self.mode {
            backend::mode::IPIP => outer,
            backend::mode::GUE => outer + 12,
            _ => 0,
        }
    }
}

/// Port of the measured services.
pub const PORT: u16 = 80;
/// ifindex of the loopback interface, on which BPF_PROG_TEST_RUN receives.
const LOOPBACK: u32 = 1;

/// The loaded ingress program.
pub struct Ingress {
    bpf: Ebpf,
    specs: Vec<ServiceSpec>,
    next_slot: u32,
    next_backend: u32,
}

impl Ingress {
    /// Loads `object` with these tables.
    pub fn load(object: &[u8], tables: Tables) -> Result<Self> {
        let mut bpf = EbpfLoader::new()
            .override_global(names::SETTINGS, &IngressSettings::DEFAULT, true)
            .override_global(names::LOG_LEVEL, &0u8, true)
            .map_max_entries(names::FLOWS, tables.flows)
            .map_max_entries(names::UDP_FLOWS, tables.udp_flows)
            .load(object)
            .context("load the ingress object")?;
        load_xdp(&mut bpf, names::PROGRAM_INGRESS)?;
        let mut ingress = Self { bpf, specs: Vec::new(), next_slot: 0, next_backend: 0 };
        for index in 0..tables.other_services {
            ingress.other(index)?;
        }
        Ok(ingress)
    }

    /// The program.
    pub fn fd(&self) -> Result<ProgramFd> {
        let program: &aya::programs::Xdp =
            self.bpf.program(names::PROGRAM_INGRESS).context("program")?.try_into()?;
        Ok(program.fd()?.try_clone()?)
    }

    /// The loaded object, for its figures.
    pub fn bpf(&self) -> &Ebpf {
        &self.bpf
    }

    /// The VIP of this service, which is written first if it is new.
    pub fn vip(&mut self, spec: &ServiceSpec) -> Result<Address> {
        let place = match self.specs.iter().position(|known| known == spec) {
            Some(place) => place,
            None => {
                self.specs.push(*spec);
                self.write(self.specs.len() - 1, spec)?;
                self.specs.len() - 1
            }
        };
        Ok(vip_of(spec.family, place))
    }

    fn map<'a, M: TryFrom<&'a mut Map>>(&'a mut self, name: &str) -> Result<M>
    where
        M::Error: std::error::Error + Send + Sync + 'static,
    {
        let map = self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        M::try_from(map).with_context(|| format!("map {name} has another type"))
    }

    fn write(&mut self, place: usize, spec: &ServiceSpec) -> Result<()> {
        let index = place as u32;
        let (first, base) = (self.next_backend, self.next_slot);
        self.next_backend += spec.backends;
        self.next_slot += spec.slot_count.next_multiple_of(LINE);
        let mut backends: Array<&mut MapData, Backend> = self.map(names::BACKENDS)?;
        for i in 0..spec.backends {
            backends.set(first + i, backend_of(spec, i, index), 0).context("too many backends")?;
        }
        for (name, half) in
            [(names::PRIMARIES, (|s| s.primary) as fn(Slot) -> u32), (names::SECONDARIES, |s| s.secondary)]
        {
            let mut lines: Array<&mut MapData, Line> = self.map(name)?;
            // Tables begin on a line here; their last one may hold a few words of nobody's.
            for i in (0..spec.slot_count).step_by(LINE as usize) {
                let words = std::array::from_fn(|j| half(slot_of(spec, first, i + j as u32)));
                lines.set((base + i) / LINE, Line { words }, 0).context("too many slots")?;
            }
        }
        self.switch_on(
            index,
            vip_of(spec.family, place),
            spec.protocol,
            ServiceView {
                seed: [0x1234_5678_9abc_def0 ^ u64::from(index), 0x0f1e_2d3c_4b5a_6978],
                slot_base: base,
                slot_count: spec.slot_count,
                flags: spec.flags,
                scheduler: spec.scheduler,
                protocol: spec.protocol,
                udp_timeout_s: 60,
                ..ServiceView::default()
            },
        )
    }

    fn switch_on(&mut self, index: u32, vip: Address, protocol: u8, view: ServiceView) -> Result<()> {
        let service = Service { used: 1, views: [view; 2], ..Service::default() };
        let mut services: Array<&mut MapData, Service> = self.map(names::SERVICES)?;
        services.set(index, service, 0).context("too many services")?;
        let mut vips: HashMap<&mut MapData, VipKey, Vip> = self.map(names::VIPS)?;
        vips.insert(VipKey { vip }, Vip::EMPTY, 0)?;
        let mut keys: HashMap<&mut MapData, ServiceKey, u32> = self.map(names::SERVICE_INDEX)?;
        keys.insert(ServiceKey { vip, port: PORT.into(), protocol, pad: 0 }, index, 0)?;
        Ok(())
    }

    /// A service that only takes room: no packet goes there.
    fn other(&mut self, number: u32) -> Result<()> {
        let vip = Family::V6.address(200 + (number >> 8) as u8, number as u8);
        // Counted down from the end, so that the measured ones stay where they are.
        let index = lb_common::limits::SERVICES - 1 - number;
        self.switch_on(index, vip, TCP, ServiceView::default())
    }
}

fn vip_of(family: Family, place: usize) -> Address {
    family.address(7, place as u8 + 1)
}

fn backend_of(spec: &ServiceSpec, i: u32, service: u32) -> Backend {
    Backend {
        address: spec.outer.address(10 + (i >> 8) as u8, i as u8),
        source: spec.outer.address(0, 0),
        next_hop: [2, 0, 0, 1, (i >> 8) as u8, i as u8],
        mtu: 1_600,
        egress_mac: [2, 0, 0, 0, 0, 1],
        ifindex: LOOPBACK,
        flags: backend::flags::USED | backend::flags::RESOLVED,
        mode: spec.mode,
        source_bits: if spec.mode == backend::mode::IPIP { 8 } else { 0 },
        port: GUE_PORT.into(),
        service,
        ..Backend::default()
    }
}

/// Spreads the backends over the slots as evenly as Maglev does, in no order.
fn slot_of(spec: &ServiceSpec, first: u32, i: u32) -> Slot {
    let pick = |salt: u64| {
        let mut h = (u64::from(i) + salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        h = (h ^ h >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        h = (h ^ h >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        first + ((h >> 33) % u64::from(spec.backends)) as u32
    };
    match spec.slots {
        Slots::Stable => Slot { primary: pick(0), secondary: pick(1 << 32) },
        Slots::Transition => Slot { primary: pick(0) | TRACKED, secondary: pick(1 << 32) | TRANSITION },
        Slots::Tracked => Slot { primary: pick(0) | TRACKED, secondary: NO_BACKEND },
    }
}

/// The loaded decap program.
pub struct Decap {
    bpf: Ebpf,
}

impl Decap {
    /// Loads it; it accepts packets to `ours` and serves `vips`.
    pub fn load(ours: &[Address], vips: &[Address]) -> Result<Self> {
        let mut bpf = EbpfLoader::new()
            .override_global(names::SETTINGS, &DecapSettings::DEFAULT, true)
            .override_global(names::LOG_LEVEL, &0u8, true)
            .load(objects::DECAP)
            .context("load the decap object")?;
        load_xdp(&mut bpf, names::PROGRAM_DECAP)?;
        for (name, addresses) in [(names::DECAP_ADDRESSES, ours), (names::DECAP_VIPS, vips)] {
            let map = bpf.map_mut(name).with_context(|| format!("no map {name}"))?;
            let mut map: HashMap<_, Address, u32> = HashMap::try_from(map)?;
            for address in addresses {
                map.insert(address, 1, 0)?;
            }
        }
        Ok(Self { bpf })
    }

    /// The program.
    pub fn fd(&self) -> Result<ProgramFd> {
        let program: &aya::programs::Xdp =
            self.bpf.program(names::PROGRAM_DECAP).context("program")?.try_into()?;
        Ok(program.fd()?.try_clone()?)
    }

    /// The loaded object, for its figures.
    pub fn bpf(&self) -> &Ebpf {
        &self.bpf
    }
}

/// Memory of a map as the kernel reports it, in bytes, and its entries.
pub fn map_memory(map: &Map) -> Result<(u64, u32)> {
    let data = data_of(map).context("a map of a kind that the programs do not have")?;
    let fd = data.fd();
    let path = format!("/proc/self/fdinfo/{}", std::os::fd::AsFd::as_fd(fd).as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let field = |name: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse::<u64>().ok())
            .with_context(|| format!("{path} has no {name}"))
    };
    Ok((field("memlock")?, field("max_entries")? as u32))
}

fn data_of(map: &Map) -> Option<&MapData> {
    match map {
        Map::Array(data)
        | Map::HashMap(data)
        | Map::LruHashMap(data)
        | Map::PerCpuArray(data)
        | Map::PerCpuHashMap(data)
        | Map::PerCpuLruHashMap(data)
        | Map::DevMapHash(data)
        | Map::LpmTrie(data)
        | Map::RingBuf(data) => Some(data),
        _ => None,
    }
}
