//! The programs as they ship, loaded and filled without a daemon, so that the packet path is measured
//! by itself.

use std::{
    fs,
    ops::Range,
    os::fd::{AsFd, AsRawFd},
};

use anyhow::{Context, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, Map, MapData, PerCpuArray, ProgramArray},
    programs::{ProgramFd, Xdp},
};
use lb_common::{
    Address, Backend, Flow, FlowKey, Reason, Service, ServiceKey, ServiceView, Slot, Vip, VipKey, exact,
    guard::{GuardKey, GuardState, block, verdict},
    mapped, names,
    settings::{DecapSettings, IngressSettings, features},
    slot::{LINE, Line},
};
use lb_userspace::apply::dataplane::{SynCache, loaded_features};

use crate::{objects, packet::rows::Listed};

/// Sizes of the flow tables, and what else is in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tables {
    /// Entries of `FLOWS`.
    pub flows: u32,
    /// Entries of `UDP_FLOWS`.
    pub udp_flows: u32,
    /// Entries of `NAT_FLOWS` and `NAT_REPLIES`.
    pub nat_flows: u32,
    /// Services beside those that are measured.
    pub other_services: u32,
    /// Features that `lbd` loads only while somebody uses them, and which this row uses.
    pub used: u32,
    /// Whether users' programs may stand before and after ours.
    pub chained: bool,
    /// Rows that differ here have maps of their own although these are of the same size.
    pub copy: u32,
}

impl Tables {
    /// As they ship.
    pub const DEFAULT: Self = Self {
        flows: lb_common::limits::FLOWS,
        udp_flows: lb_common::limits::UDP_FLOWS,
        nat_flows: lb_common::limits::NAT_FLOWS,
        other_services: 0,
        used: 0,
        chained: false,
        copy: 0,
    };

    /// Memory that the flow tables take when they are full, about, in MiB.
    pub fn memory_mib(&self) -> u64 {
        // As the kernel accounts them; a binding has an entry on each side.
        (u64::from(self.flows) * 104 + u64::from(self.udp_flows) * 104 + u64::from(self.nat_flows) * 320)
            >> 20
    }
}

/// Map of the deny list's blocks; an older object, to compare with, may have none.
pub const GUARD_BLOCKS: &str = names::GUARD_BLOCKS;

/// The loaded ingress program.
pub struct Ingress {
    bpf: Ebpf,
    next_slot: u32,
    next_backend: u32,
}

impl Ingress {
    /// Loads `object` with these tables.
    pub fn load(object: &[u8], tables: Tables) -> Result<Self> {
        // Echo requests are answered, however many there are; and a million SYNs in a second are no flood here, or
        // what is measured would be their refusal.
        let settings = IngressSettings {
            icmp_per_s: 1_000_000_000,
            icmp_burst: u32::MAX,
            features: loaded_features(features::ALL, tables.chained, tables.used),
            ..IngressSettings::DEFAULT
        };
        let mut bpf = EbpfLoader::new()
            .override_global(names::SETTINGS, &settings, true)
            .override_global(names::LOG_LEVEL, &0u8, true)
            .map_max_entries(names::NAT_FLOWS, tables.nat_flows)
            .map_max_entries(names::NAT_REPLIES, tables.nat_flows)
            .map_max_entries(names::FLOWS, tables.flows)
            .map_max_entries(names::UDP_FLOWS, tables.udp_flows)
            .load(object)
            .context("load the ingress object")?;
        load_xdp(&mut bpf, names::PROGRAM_INGRESS)?;
        for (name, place) in names::stage::INGRESS_PROGRAMS {
            let fd = load_xdp(&mut bpf, name)?.fd()?.try_clone()?;
            let mut stages = ProgramArray::try_from(bpf.map_mut(names::STAGES).context("map STAGES")?)?;
            stages.set(place, &fd, 0)?;
        }
        Ok(Self { bpf, next_slot: 0, next_backend: 0 })
    }

    /// The program.
    pub fn program(&self) -> Result<&Xdp> {
        Ok(self.bpf.program(names::PROGRAM_INGRESS).context("program")?.try_into()?)
    }

    /// Its descriptor.
    pub fn fd(&self) -> Result<ProgramFd> {
        Ok(self.program()?.fd()?.try_clone()?)
    }

    /// The loaded object, for its figures.
    pub fn bpf(&self) -> &Ebpf {
        &self.bpf
    }

    fn map<'a, M: TryFrom<&'a mut Map>>(&'a mut self, name: &str) -> Result<M>
    where
        M::Error: std::error::Error + Send + Sync + 'static,
    {
        let map = self.bpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        M::try_from(map).with_context(|| format!("map {name} has another type"))
    }

    /// Brings the filter in front of the table of flows up to date, as `lbd` does each second; an older object, to
    /// compare with, may have none.
    pub fn settle_filter(&mut self) -> Result<()> {
        let Some(Map::Array(map)) = self.bpf.map(names::SYN_CACHE) else { return Ok(()) };
        let syn_cache = SynCache::new(map)?;
        let mut scan = syn_cache.begin();
        let flows: HashMap<&mut MapData, FlowKey, Flow> = self.map(names::FLOWS)?;
        for key in flows.keys() {
            scan.add(&key.context("map FLOWS")?);
        }
        syn_cache.settle(&scan);
        Ok(())
    }

    /// Writes backends and returns the first one's index.
    pub fn add_backends(&mut self, backends: impl ExactSizeIterator<Item = Backend>) -> Result<u32> {
        let first = self.next_backend;
        self.next_backend += backends.len() as u32;
        let mut map: Array<&mut MapData, Backend> = self.map(names::BACKENDS)?;
        for (i, backend) in backends.enumerate() {
            map.set(first + i as u32, backend, 0).context("too many backends")?;
        }
        Ok(first)
    }

    /// Writes a table and returns its first slot's place.
    pub fn add_slots(&mut self, slots: impl ExactSizeIterator<Item = Slot>) -> Result<u32> {
        let base = self.next_slot;
        // Tables begin on a line here.
        self.next_slot += (slots.len() as u32).next_multiple_of(LINE);
        let slots: Vec<Slot> = slots.collect();
        for (name, half) in
            [(names::PRIMARIES, (|s| s.primary) as fn(&Slot) -> u32), (names::SECONDARIES, |s| s.secondary)]
        {
            let mut lines: Array<&mut MapData, Line> = self.map(name)?;
            for (i, part) in slots.chunks(LINE as usize).enumerate() {
                let words = std::array::from_fn(|j| part.get(j).map_or(0, half));
                lines.set(base / LINE + i as u32, Line { words }, 0).context("too many slots")?;
            }
        }
        Ok(base)
    }

    /// Writes the service `index` and makes it known under its key.
    pub fn switch_on(&mut self, index: u32, vip: Address, port: u16, view: ServiceView) -> Result<()> {
        let service = Service { used: 1, views: [view; 2], ..Service::default() };
        let mut services: Array<&mut MapData, Service> = self.map(names::SERVICES)?;
        services.set(index, service, 0).context("too many services")?;
        let mut vips: HashMap<&mut MapData, VipKey, Vip> = self.map(names::VIPS)?;
        vips.insert(VipKey { vip }, Vip::EMPTY, 0)?;
        let mut keys: HashMap<&mut MapData, ServiceKey, u32> = self.map(names::SERVICE_INDEX)?;
        let key = ServiceKey { vip, port: port.into(), protocol: view.protocol, pad: 0 };
        keys.insert(key, index, 0)?;
        // An older object, to compare with, may not have these.
        if self.bpf.map(names::EXACT).is_some() {
            self.spare_lookups(&key, index)?;
        }
        Ok(())
    }

    /// Denies so many blocks of 256 IPv4 addresses, in no order, and so many clients of 10.0.0.0/8 as `listed` says. A list
    /// of addresses has the blocks as addresses, too.
    pub fn deny(&mut self, blocks: u32, listed: Listed, clients: u32) -> Result<()> {
        let by_address = listed == Listed::Address;
        let bit = if by_address { block::ASK } else { block::DENY };
        if listed != Listed::No {
            // The wrapper gives 16 ports to an address.
            let addresses = 10 << 24..(10 << 24) + (clients / 16).max(1);
            for number in addresses.clone().step_by(256) {
                self.paint(number >> 8, bit)?;
            }
            if by_address {
                self.deny_addresses(addresses)?;
            }
        }
        for number in 0..blocks {
            // Clients' and workers' own stay out of it: 100.0.0.0 and above.
            let number = 100 << 16 | (number.wrapping_mul(0x9e37_79b9) >> 12) & 0xf_ffff;
            self.paint(number, bit)?;
            if by_address {
                self.deny_addresses(number << 8..(number << 8) + 1)?;
            }
        }
        // Of prefixes beyond /24 only whole addresses are in use.
        let v4 = if by_address { 1 << 7 } else { 0 };
        let mut state: Array<&mut MapData, GuardState> = self.map(names::GUARD_STATE)?;
        Ok(state.set(0, GuardState { v4, ..GuardState::default() }, 0)?)
    }

    /// Sets a bit of a block.
    fn paint(&mut self, number: u32, bit: u32) -> Result<()> {
        const IN_LINE: u32 = block::IN_WORD * LINE;
        let mut lines: Array<&mut MapData, Line> = self.map(GUARD_BLOCKS)?;
        let mut line = lines.get(&(number / IN_LINE), 0)?;
        line.words[(number / block::IN_WORD % LINE) as usize] |= bit << (number % block::IN_WORD * 2);
        Ok(lines.set(number / IN_LINE, line, 0)?)
    }

    /// Enters single addresses.
    fn deny_addresses(&mut self, addresses: Range<u32>) -> Result<()> {
        let mut entries: HashMap<&mut MapData, GuardKey, u32> = self.map(names::GUARD_ENTRIES)?;
        for address in addresses {
            let key = GuardKey { address: mapped(address.to_be_bytes()), bits: 128 };
            entries.insert(key, verdict::DENY, 0).context("the deny list is full")?;
        }
        Ok(())
    }

    /// As `lbd` does.
    fn spare_lookups(&mut self, key: &ServiceKey, index: u32) -> Result<()> {
        let (line, entry) = exact::entry(key, index);
        let mut lines: Array<&mut MapData, exact::ExactLine> = self.map(names::EXACT)?;
        let mut value = lines.get(&line, 0)?;
        if let Some(free) = value.entries.iter_mut().find(|known| known.port_and_service == 0) {
            *free = entry;
            lines.set(line, value, 0)?;
        }
        let mut words: Array<&mut MapData, Line> = self.map(names::VIP_FILTER)?;
        let bit = exact::filter_bit(entry.vip);
        for (word, bits) in [(bit / 32, 1 << (bit % 32)), (exact::FILTER_ARMED, 1)] {
            let mut value = words.get(&(word / LINE), 0)?;
            value.words[(word % LINE) as usize] |= bits;
            words.set(word / LINE, value, 0)?;
        }
        Ok(())
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
    pub fn program(&self) -> Result<&Xdp> {
        Ok(self.bpf.program(names::PROGRAM_DECAP).context("program")?.try_into()?)
    }

    /// Its descriptor.
    pub fn fd(&self) -> Result<ProgramFd> {
        Ok(self.program()?.fd()?.try_clone()?)
    }

    /// How often it has counted this.
    pub fn count(&self, reason: Reason) -> Result<u64> {
        let map = self.bpf.map(names::REASONS).context("no map REASONS")?;
        let counts: PerCpuArray<_, u64> = PerCpuArray::try_from(map)?;
        Ok(counts.get(&(reason as u32), 0)?.iter().sum())
    }

    /// The loaded object, for its figures.
    pub fn bpf(&self) -> &Ebpf {
        &self.bpf
    }
}

/// Loads the XDP program `name` of `bpf` and returns it.
pub fn load_xdp<'a>(bpf: &'a mut Ebpf, name: &str) -> Result<&'a mut Xdp> {
    let program: &mut Xdp =
        bpf.program_mut(name).with_context(|| format!("no program {name} in the object"))?.try_into()?;
    program.load().with_context(|| format!("the verifier refused {name}"))?;
    Ok(program)
}

/// Memory of a map as the kernel reports it, in bytes, and its entries.
pub fn map_memory(map: &Map) -> Result<(u64, u32)> {
    let data = data_of(map).context("a map of a kind that the programs do not have")?;
    let path = format!("/proc/self/fdinfo/{}", data.fd().as_fd().as_raw_fd());
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
