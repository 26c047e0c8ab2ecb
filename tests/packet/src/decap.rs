//! The `decap` program under test.

use crate::Run;
use anyhow::{Context, Result};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, PerCpuArray, PerCpuValues, ProgramArray},
    programs::Xdp,
    util::nr_cpus,
};
use lb_common::{Address, Reason, names, reply::ReplyHop, settings::DecapSettings};

/// The loaded program and its maps.
pub struct Decap {
    bpf: Ebpf,
}

impl Decap {
    /// Loads the program; it accepts encapsulated packets to `ours` and serves `vips`.
    pub fn load(settings: DecapSettings, ours: &[Address], vips: &[Address]) -> Result<Self> {
        Self::load_with(settings, 0, ours, vips)
    }

    /// The same with a log level.
    pub fn load_with(
        settings: DecapSettings,
        log_level: u8,
        ours: &[Address],
        vips: &[Address],
    ) -> Result<Self> {
        let mut bpf = EbpfLoader::new()
            .override_global(names::SETTINGS, &settings, true)
            .override_global(names::LOG_LEVEL, &log_level, true)
            .load(lb_userspace::apply::objects::DECAP)
            .context("load the decap object")?;
        let program: &mut Xdp = bpf.program_mut(names::PROGRAM_DECAP).context("program")?.try_into()?;
        program.load().context("the verifier refused the decap program")?;
        for (name, place) in names::stage::DECAP_PROGRAMS {
            let program: &mut Xdp = bpf.program_mut(name).context("stage")?.try_into()?;
            program.load().with_context(|| format!("the verifier refused stage {name}"))?;
            let fd = program.fd()?.try_clone()?;
            let mut stages: ProgramArray<_> = bpf.map_mut(names::STAGES).context("stages")?.try_into()?;
            stages.set(place, &fd, 0)?;
        }
        for (map, addresses) in [(names::DECAP_ADDRESSES, ours), (names::DECAP_VIPS, vips)] {
            let mut map: HashMap<_, Address, u32> = HashMap::try_from(bpf.map_mut(map).context("map")?)?;
            for address in addresses {
                map.insert(address, 1, 0)?;
            }
        }
        Ok(Self { bpf })
    }

    /// The program, for its figures.
    pub fn program(&self) -> &Xdp {
        self.bpf.program(names::PROGRAM_DECAP).and_then(|p| p.try_into().ok()).expect("loaded in `load`")
    }

    /// One of the object's programs.
    pub fn program_named(&self, name: &str) -> &Xdp {
        self.bpf.program(name).and_then(|p| p.try_into().ok()).expect("loaded in `load`")
    }

    /// Says how answers leave.
    pub fn reply_hop(&mut self, place: u32, hop: ReplyHop) {
        let mut hops: Array<_, ReplyHop> =
            Array::try_from(self.bpf.map_mut(names::REPLY_HOPS).expect("map")).expect("its type");
        hops.set(place, hop, 0).expect("in range");
    }

    /// Runs one packet through the program.
    pub fn run(&self, packet: &[u8]) -> Result<Run> {
        crate::ingress::run(self.program(), packet)
    }

    /// All reasons that were counted since the last call.
    pub fn take_counts(&mut self) -> Vec<(Reason, u64)> {
        let counts: Vec<_> =
            Reason::ALL.iter().map(|r| (*r, self.count(*r))).filter(|(_, n)| *n != 0).collect();
        let cpus = nr_cpus().expect("the kernel lists its processors");
        let mut map: PerCpuArray<_, u64> =
            PerCpuArray::try_from(self.bpf.map_mut(names::REASONS).expect("map")).expect("its type");
        for (reason, _) in &counts {
            let zeros = PerCpuValues::try_from(vec![0; cpus]).expect("one for each");
            map.set(*reason as u32, zeros, 0).expect("in range");
        }
        counts
    }

    /// A reason's counter over all CPUs.
    pub fn count(&self, reason: Reason) -> u64 {
        let counts: PerCpuArray<_, u64> =
            PerCpuArray::try_from(self.bpf.map(names::REASONS).expect("map")).expect("its type");
        counts.get(&(reason as u32), 0).expect("in range").iter().sum()
    }
}
