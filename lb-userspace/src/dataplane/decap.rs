//! The dataplane of a worker: the `decap` program and its two maps.

use super::{
    DataplaneError, Interface,
    attach::{self, Attached, Request, take},
    reader,
};
use aya::{
    Ebpf,
    maps::{HashMap, MapData, PerCpuArray},
};
use lb_common::{Address, Reason, names, settings::DecapSettings};
use std::{collections::BTreeSet, fs, path::PathBuf};
use zerocopy::IntoBytes;

/// How to attach a worker's dataplane.
#[derive(Clone, Debug)]
pub struct DecapOptions {
    /// Interfaces.
    pub interfaces: Vec<String>,
    /// Whether generic mode will do where the driver has none.
    pub allow_generic: bool,
    /// Directory of the pins, on a BPF filesystem.
    pub pin_path: PathBuf,
    /// The program's settings.
    pub settings: DecapSettings,
    /// Log level of the program: 0 off, 1 error … 5 trace.
    pub log_level: u8,
}

/// The writer of a worker's maps.
pub struct DecapDataplane {
    addresses: HashMap<MapData, Address, u32>,
    vips: HashMap<MapData, Address, u32>,
    reasons: PerCpuArray<MapData, u64>,
    /// Where the program runs.
    pub interfaces: Vec<Interface>,
    /// Whether maps of an earlier daemon were taken over.
    pub adopted: bool,
    bpf: Ebpf,
    _lock: fs::File,
}

impl DecapDataplane {
    /// Loads and attaches, or takes over what an earlier daemon left running.
    pub fn attach(options: &DecapOptions) -> Result<Self, DataplaneError> {
        let Attached { mut bpf, interfaces, adopted, lock } = attach::attach(&Request {
            object: crate::objects::DECAP,
            program: names::PROGRAM_DECAP,
            stages: &[],
            maps: &names::DECAP_MAPS,
            sizes: &[],
            settings: options.settings.as_bytes(),
            log_level: options.log_level,
            pin_path: &options.pin_path,
            interfaces: &options.interfaces,
            allow_generic: options.allow_generic,
        })?;
        Ok(Self {
            addresses: take(&mut bpf, names::DECAP_ADDRESSES)?,
            vips: take(&mut bpf, names::DECAP_VIPS)?,
            reasons: take(&mut bpf, names::REASONS)?,
            interfaces,
            adopted,
            bpf,
            _lock: lock,
        })
    }

    /// Makes these the addresses at which encapsulated packets are accepted.
    pub fn set_addresses(&mut self, addresses: &BTreeSet<Address>) -> Result<(), DataplaneError> {
        set(&mut self.addresses, names::DECAP_ADDRESSES, addresses)
    }

    /// Makes these the VIPs that are served here.
    pub fn set_vips(&mut self, vips: &BTreeSet<Address>) -> Result<(), DataplaneError> {
        set(&mut self.vips, names::DECAP_VIPS, vips)
    }

    /// Each reason's counter over all CPUs.
    pub fn reasons(&self) -> Vec<(Reason, u64)> {
        reader::reasons(&self.reasons)
    }

    /// The loaded object, for aya-log.
    pub fn bpf_mut(&mut self) -> &mut Ebpf {
        &mut self.bpf
    }
}

/// Adds what is missing, then removes what is too much: nothing that stays is ever absent.
fn set(
    map: &mut HashMap<MapData, Address, u32>,
    name: &'static str,
    wanted: &BTreeSet<Address>,
) -> Result<(), DataplaneError> {
    let error = |source| DataplaneError::Map { map: name, source };
    for address in wanted {
        map.insert(address, 1, 0).map_err(error)?;
    }
    let present: Vec<Address> = map.keys().collect::<Result<_, _>>().map_err(error)?;
    for address in present.iter().filter(|a| !wanted.contains(*a)) {
        super::absent_is_fine(map.remove(address)).map_err(error)?;
    }
    Ok(())
}
