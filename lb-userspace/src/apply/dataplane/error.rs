//! Errors of programs and maps, phrased so that an operator knows what to do.

use lb_common::limits::KERNEL_FLOOR;
use std::{io, path::PathBuf};

/// Why a program or a map could not be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the fields are those of the messages")]
pub enum DataplaneError {
    /// The binary contains no programs.
    #[error(
        "this binary was built without its XDP programs (LB_SKIP_BPF); run `cargo xtask setup` and build it again"
    )]
    NoPrograms,
    /// An interface does not exist.
    #[error("interface {interface} does not exist; this host has: {present}")]
    NoInterface { interface: String, present: String },
    /// The driver refuses the program.
    #[error(
        "interface {interface} (driver {driver}): {why}; {advice}, or allow the slower generic mode with --allow-generic"
    )]
    NotTaken { interface: String, driver: String, why: String, advice: String, may_pass: bool },
    /// Generic mode fails too.
    #[error("interface {interface} (driver {driver}): {why}; {advice}")]
    NotEvenGeneric { interface: String, driver: String, why: String, advice: String, may_pass: bool },
    /// Generic mode needs programs without frags, but users' programs in the shared array have frags.
    #[error(
        "interface {interface}: generic mode does not support programs with frags, and users' programs in {path} have them; load those without the flag (SEC(\"xdp\")), run `lbd detach`, and start lbd again"
    )]
    GenericFrags { interface: String, path: PathBuf },
    /// Another program is attached.
    #[error(
        "interface {interface} already has an XDP program that this lbd did not attach (`ip link show dev {interface}` names it); stop the lbd or other daemon that holds it, or run `ip link set dev {interface} xdp off`"
    )]
    Busy { interface: String },
    /// Attaching failed for another reason.
    #[error("cannot attach to interface {interface}: {source}")]
    Attach { interface: String, source: io::Error },
    /// Another daemon is running.
    #[error(
        "another lbd (pid {pid}) already runs with the pins in {path}; stop it first, or start this one with another --pin-path"
    )]
    Locked { path: PathBuf, pid: String },
    /// The process lacks a capability.
    #[error("{what}: not permitted; run as root (sudo) or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    Denied { what: &'static str },
    /// The pin path is not on a BPF filesystem.
    #[error(
        "{path} is not on a BPF filesystem; mount one (`mount -t bpf bpf /sys/fs/bpf`) or choose another --pin-path"
    )]
    NoBpffs { path: PathBuf },
    /// The pins have another ABI version.
    #[error(
        "the pinned maps in {path} have ABI version {pinned}, and this lbd with version {ours} cannot take over from them: {what}; they keep forwarding. Start the matching lbd, or remove the pins with `lbd detach --pin-path {path}` (forwarding stops until lbd is started again)"
    )]
    Abi { path: PathBuf, pinned: u32, ours: u32, what: String },
    /// The maps of this ABI version differ from what this lbd makes.
    #[error("the maps in {path} cannot be read: {what}; remove them with `lbd detach` and start again")]
    Own { path: PathBuf, what: String },
    /// Entries of a map have an unexpected size.
    #[error(
        "map {map} has entries of {got} bytes instead of {want}; remove the pins with `lbd detach` and start again"
    )]
    Layout { map: &'static str, got: u32, want: u32 },
    /// The kernel refused the program.
    #[error("the kernel refused the {program} program: {source}")]
    Load { program: &'static str, source: Box<dyn std::error::Error + Send + Sync> },
    /// The verifier refused the program.
    #[error("Linux {kernel} refused the program {program}: {reason}{}{}", floor(kernel), log.as_ref().map(|p| format!("; the complete log is in {}", p.display())).unwrap_or_default())]
    Verifier { kernel: String, program: &'static str, reason: String, log: Option<PathBuf> },
    /// A map could not be opened or queried.
    #[error("map {map}: {source}")]
    Map { map: &'static str, source: aya::maps::MapError },
    /// A map could not be mapped into memory.
    #[error("map {map} cannot be mapped into memory: {source}")]
    Mmap { map: &'static str, source: io::Error },
    /// A map could not be read.
    #[error("map {map} cannot be read: {source}")]
    Read { map: &'static str, source: io::Error },
    /// A map could not be written.
    #[error("map {map} cannot be written: {source}")]
    Write { map: &'static str, source: io::Error },
    /// An index is beyond the map's size.
    #[error("map {map} has no entry {index}")]
    Index { map: &'static str, index: u32 },
    /// A pin could not be created or removed.
    #[error("{what} {path}: {source}")]
    Pin { what: &'static str, path: PathBuf, source: io::Error },
}

impl DataplaneError {
    /// Whether the error concerns one interface, so that others can be used meanwhile.
    pub fn is_of_interface(&self) -> bool {
        matches!(self, Self::NoInterface { .. } | Self::NotTaken { .. } | Self::NotEvenGeneric { .. })
    }

    /// Whether the same start may succeed later without a change of lbd's settings.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::NoInterface { .. } => true,
            Self::NotTaken { may_pass, .. } | Self::NotEvenGeneric { may_pass, .. } => *may_pass,
            _ => false,
        }
    }
}

/// What to say of a kernel that is too old.
fn floor(release: &str) -> String {
    let (major, minor) = KERNEL_FLOOR;
    match super::kernel_version(release) {
        Some(version) if version < KERNEL_FLOOR => format!("; lbd needs Linux {major}.{minor} or later"),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_by_an_old_kernel_names_the_oldest_supported_one() {
        let message = |kernel: &str| {
            let (kernel, reason) = (kernel.to_owned(), "invalid read from stack".to_owned());
            DataplaneError::Verifier { kernel, program: "nat", reason, log: None }.to_string()
        };
        assert_eq!(
            message("5.10.0-28-amd64"),
            "Linux 5.10.0-28-amd64 refused the program nat: invalid read from stack; lbd needs Linux 6.1 or later"
        );
        assert_eq!(message("6.1.0"), "Linux 6.1.0 refused the program nat: invalid read from stack");
    }
}
