//! The ingress program with services to measure.

use anyhow::Result;
use lb_common::{
    Address, Backend, ServiceView, Slot, backend,
    service::{TCP, UDP},
    settings::GUE_PORT,
    slot::{NO_BACKEND, TRACKED, TRANSITION},
};

use super::frame::Family;
use crate::dataplane::{Ingress, Tables};

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
    /// Services like this, over which packets are spread; a power of two.
    pub services: u32,
    /// Tells services apart that are alike: flows of one are none of another's.
    pub number: u32,
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
            services: 1,
            number: 0,
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
            backend::mode::GUE_CHAIN if self.outer == Family::V4 => outer + 24,
            backend::mode::GUE_CHAIN => outer + 48,
            _ => 0,
        }
    }
}

/// Port of the measured services.
pub const PORT: u16 = 80;
/// ifindex of the loopback interface, on which BPF_PROG_TEST_RUN receives.
const LOOPBACK: u32 = 1;

/// The loaded program, and the services written so far.
pub struct Bed {
    /// The program.
    pub ingress: Ingress,
    specs: Vec<ServiceSpec>,
    next_service: u32,
}

impl Bed {
    /// Loads `object` with these tables.
    pub fn load(object: &[u8], tables: Tables) -> Result<Self> {
        let mut ingress = Ingress::load(object, tables)?;
        for number in 0..tables.other_services {
            // Takes room, and no packet goes there. Counted down from the end, so that the measured
            // ones stay where they are.
            let vip = Family::V4.address(200 + (number >> 8) as u8, number as u8);
            let view = ServiceView { protocol: TCP, ..ServiceView::default() };
            ingress.switch_on(lb_common::limits::SERVICES - 1 - number, vip, PORT, view)?;
        }
        Ok(Self { ingress, specs: Vec::new(), next_service: 0 })
    }

    /// The VIP of this service, which is written first if it is new; of several, the first.
    pub fn vip(&mut self, spec: &ServiceSpec) -> Result<Address> {
        let place = match self.specs.iter().position(|known| known == spec) {
            Some(place) => place,
            None => {
                self.specs.push(*spec);
                for number in 0..spec.services {
                    self.write(vip_of(spec, self.specs.len() - 1, number), spec)?;
                }
                self.specs.len() - 1
            }
        };
        Ok(vip_of(spec, place, 0))
    }

    fn write(&mut self, vip: Address, spec: &ServiceSpec) -> Result<()> {
        let index = self.next_service;
        self.next_service += 1;
        let backends: Vec<Backend> = (0..spec.backends).map(|i| backend_of(spec, i, index)).collect();
        let first = self.ingress.add_backends(backends.into_iter())?;
        let slots: Vec<Slot> = (0..spec.slot_count).map(|i| slot_of(spec, first, i)).collect();
        let view = ServiceView {
            seed: [0x1234_5678_9abc_def0 ^ u64::from(index), 0x0f1e_2d3c_4b5a_6978],
            slot_base: self.ingress.add_slots(slots.into_iter())?,
            slot_count: spec.slot_count,
            flags: spec.flags,
            scheduler: spec.scheduler,
            protocol: spec.protocol,
            udp_timeout_s: 60,
            // Where the flags say that there is a limit: so many that none is refused.
            source_interval_ns: 1,
            source_tolerance_ns: 1_000_000_000,
            source_bits: [32, 64],
            ..ServiceView::default()
        };
        self.ingress.switch_on(index, vip, PORT, view)
    }
}

/// VIPs of one spec lie next to each other.
fn vip_of(spec: &ServiceSpec, place: usize, number: u32) -> Address {
    match spec.services {
        1 => spec.family.address(7, place as u8 + 1),
        _ => spec.family.address(16 + (number >> 8) as u8, number as u8),
    }
}

fn backend_of(spec: &ServiceSpec, i: u32, service: u32) -> Backend {
    Backend {
        address: spec.outer.address(10 + (i >> 8) as u8, i as u8),
        source: spec.outer.address(0, if spec.mode == backend::mode::NAT { 1 } else { 0 }),
        next_hop: [2, 0, 0, 1, (i >> 8) as u8, i as u8],
        mtu: 1_600,
        egress_mac: [2, 0, 0, 0, 0, 1],
        ifindex: LOOPBACK,
        flags: backend::flags::USED | backend::flags::RESOLVED,
        mode: spec.mode,
        source_bits: if spec.mode == backend::mode::IPIP { 8 } else { 0 },
        // In mode nat: the one that the client asked for.
        port: if spec.mode == backend::mode::NAT { 0.into() } else { GUE_PORT.into() },
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
