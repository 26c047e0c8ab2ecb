//! The programs that encapsulate health probes, and their map. Nothing is pinned: they end with lbd.

use super::DataplaneError;
use crate::observed::health::ProbePrograms;
use aya::{
    Ebpf, EbpfLoader,
    maps::{HashMap, MapData},
    programs::{LinkOrder, SchedClassifier, TcAttachType, tc::TcAttachOptions},
};
use lb_common::{names, probe::ProbeTunnel};
use std::{collections::BTreeSet, io};

/// Writer of the map, with the programs to attach.
pub struct ProbeDataplane {
    bpf: Ebpf,
    ways: HashMap<MapData, u32, ProbeTunnel>,
    attached: BTreeSet<u32>,
}

/// Programs and their directions.
const PROGRAMS: [(&str, TcAttachType); 2] =
    [(names::PROGRAM_PROBE_OUT, TcAttachType::Egress), (names::PROGRAM_PROBE_IN, TcAttachType::Ingress)];

impl ProbeDataplane {
    /// Loads the programs; they see no packets before [`Self::attach`].
    ///
    /// # Errors
    /// The kernel refuses the programs.
    pub fn load() -> Result<Self, DataplaneError> {
        let refused = |what: String| DataplaneError::Attach {
            interface: "any".to_owned(),
            source: io::Error::other(what),
        };
        let mut bpf =
            EbpfLoader::new().load(crate::apply::objects::PROBE).map_err(|e| refused(e.to_string()))?;
        for (name, _) in PROGRAMS {
            classifier(&mut bpf, name).load().map_err(|e| refused(format!("{name}: {e}")))?;
        }
        let ways = super::attach::take(&mut bpf, names::PROBE_TUNNELS)?;
        Ok(Self { bpf, ways, attached: BTreeSet::new() })
    }

    /// Attaches both programs to an interface, once.
    ///
    /// # Errors
    /// The interface does not exist, or the kernel is older than 6.6 and has no tcx.
    pub fn attach(&mut self, ifindex: u32) -> Result<(), DataplaneError> {
        if self.attached.contains(&ifindex) {
            return Ok(());
        }
        let interface = nix::net::if_::if_indextoname(ifindex)
            .map_err(|e| DataplaneError::Attach { interface: format!("{ifindex}"), source: e.into() })?
            .to_string_lossy()
            .into_owned();
        for (name, place) in PROGRAMS {
            let order = TcAttachOptions::TcxOrder(LinkOrder::default());
            // aya keeps the link in the program until it is dropped.
            classifier(&mut self.bpf, name).attach_with_options(&interface, place, order).map_err(|e| {
                DataplaneError::Attach {
                    interface: interface.clone(),
                    source: io::Error::other(format!("{name} (tcx, Linux 6.6): {e}")),
                }
            })?;
        }
        self.attached.insert(ifindex);
        Ok(())
    }

    /// Sets the encapsulation of probes with a mark.
    ///
    /// # Errors
    /// The map is full.
    pub fn set_tunnel(&mut self, mark: u32, way: ProbeTunnel) -> Result<(), DataplaneError> {
        self.ways
            .insert(mark, way, 0)
            .map_err(|source| DataplaneError::Map { map: names::PROBE_TUNNELS, source })
    }
}

impl ProbePrograms for ProbeDataplane {
    fn attach(&mut self, ifindex: u32) -> Result<(), String> {
        Self::attach(self, ifindex).map_err(|e| e.to_string())
    }

    fn set_tunnel(&mut self, mark: u32, way: ProbeTunnel) -> Result<(), String> {
        Self::set_tunnel(self, mark, way).map_err(|e| e.to_string())
    }
}

fn classifier<'b>(bpf: &'b mut Ebpf, name: &str) -> &'b mut SchedClassifier {
    let program = bpf.program_mut(name).expect("names are those that the object was built with");
    program.try_into().expect("it is a classifier")
}
