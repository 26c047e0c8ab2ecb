//! Loads each program with each combination of settings that can be shipped, and compares what the verifier of the running
//! kernel had to walk with `budget.txt`, which has a column for each kernel that is supported. Settings are read-only
//! globals, so each combination is another program to the verifier. Needs root. The tests are in `tests/`.
//!
//! Another kernel runs the same test binary in a virtual machine: it reads no file but its own image. Variables:
//! * `LB_VERIFIER_COLUMN`: the column of budgets to hold, `6.1` for example; without it, the running kernel's. The column
//!   also says what the programs are told that the kernel can do.
//! * `LB_VERIFIER_SETTINGS=default`: only the settings that users get, with and without logging.
//! * `LB_VERIFIER_ONLY=NAME,...`: only these programs.
//! * `LB_VERIFIER_INGRESS=FILE`: this object instead of the ingress host's object that lbd carries, to compare two.
//! * `LB_VERIFIER_WRITE=FILE`: where `budget.txt` goes with budgets by what was measured, in this kernel's column
//!   (`--test-threads=1`; several kernels one after the other with the same file).
//! * `LB_VERIFIER_LOG=DIR`: where the verifier's log of a refused program goes (in full; minutes under emulation).

mod budget;

pub use budget::{BUDGETS, Budgets, LIMIT};

use anyhow::{Context, Result, bail};
use aya::{EbpfLoader, Pod, VerifierLogLevel, programs::Program};
use lb_common::{
    names,
    settings::{DecapSettings, IngressSettings, kernel},
    slot::LINE,
};
use std::env;

/// What the kernel says of a loaded program.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Program and settings, as `budget.txt` names them.
    pub name: String,
    /// Instructions that the verifier walked, all paths together; 0 where the kernel does not tell (before 5.16).
    pub verified: u32,
    /// Bytes of BPF instructions after the verifier's rewriting.
    pub translated_bytes: u32,
    /// Bytes of machine code.
    pub jited_bytes: u32,
}

/// Log levels that are shipped: none, and all.
const LOG_LEVELS: [u8; 2] = [0, 5];

/// What to load, and for which kernel.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Column of budgets.
    pub column: String,
    /// Only the settings that users get.
    pub is_short: bool,
    /// Only these programs; empty: all.
    only: Vec<String>,
}

impl Plan {
    /// By the environment and the running kernel.
    pub fn from_env(budgets: &Budgets) -> Result<Self> {
        let release =
            std::fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
        let column = match env::var("LB_VERIFIER_COLUMN") {
            Ok(column) => column,
            Err(_) => budgets.column_of(&release)?.to_owned(),
        };
        if !budgets.columns.contains(&column) {
            bail!("budget.txt has no column {column}; its columns are {}", budgets.columns.join(" "));
        }
        let only = env::var("LB_VERIFIER_ONLY").unwrap_or_default();
        println!("kernel {}, budgets of {column}", release.trim());
        Ok(Self {
            column,
            is_short: env::var("LB_VERIFIER_SETTINGS").is_ok_and(|which| which == "default"),
            only: only.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect(),
        })
    }

    /// What kernels of this column can do at least.
    fn kernel(&self) -> u32 {
        match self.column.as_str() {
            "5.10" => kernel::NONE,
            "5.15" => kernel::COARSE_CLOCK | kernel::CHECK_MTU,
            "5.18" | "6.1" => kernel::ALL & !kernel::FIB_SRC,
            _ => kernel::ALL,
        }
    }

    fn takes(&self, program: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == program)
    }
}

/// Writes budgets by these figures, if `LB_VERIFIER_WRITE` says where; whether it does.
pub fn write(budgets: &Budgets, column: &str, figures: &[Figures]) -> Result<bool> {
    let Some(path) = env::var_os("LB_VERIFIER_WRITE").map(std::path::PathBuf::from) else { return Ok(false) };
    let text = if path.exists() { std::fs::read_to_string(&path)? } else { BUDGETS.to_owned() };
    std::fs::write(&path, budgets.rewrite(&text, column, figures))
        .with_context(|| format!("cannot write LB_VERIFIER_WRITE={}", path.display()))?;
    Ok(true)
}

/// One object with one combination of settings.
struct Object<'a, S> {
    bytes: &'a [u8],
    settings: Option<S>,
    log: u8,
    has_frags: bool,
}

impl<S: Pod> Object<'_, S> {
    fn loader(&self, level: VerifierLogLevel) -> EbpfLoader<'_> {
        let mut loader = EbpfLoader::new();
        loader.verifier_log_level(level);
        if let Some(settings) = &self.settings {
            loader.override_global(names::SETTINGS, settings, true);
            loader.override_global(names::LOG_LEVEL, &self.log, true);
        }
        // The verifier looks at no size but that of values.
        for map in [names::PRIMARIES, names::SECONDARIES] {
            loader.map_max_entries(map, 65_536 / LINE);
        }
        for (map, size) in [
            (names::SERVICES, 128),
            (names::BACKENDS, 256),
            (names::CHANGING_BACKENDS, 256),
            (names::BACKEND_STATS, 256),
            (names::FLOWS, 1_024),
            (names::UDP_FLOWS, 1_024),
            (names::NAT_EMBRYONIC, 1_024),
        ] {
            loader.map_max_entries(map, size);
        }
        loader
    }

    /// Loads programs, each by itself to the verifier.
    fn load(&self, names: &[&str], settings: &str) -> Result<Vec<Figures>> {
        let bytes = if self.has_frags { self.bytes.to_vec() } else { without_frags(self.bytes) };
        // Of statistics the kernel writes one line; the log of a refusal takes minutes where the kernel is emulated.
        let mut bpf = self.loader(VerifierLogLevel::STATS).load(&bytes).context("create the maps")?;
        let mut all = Vec::new();
        for &name in names {
            let label = if settings.is_empty() { name.to_owned() } else { format!("{name} {settings}") };
            let program =
                bpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
            let info = match program {
                Program::Xdp(program) => program.load().and_then(|()| program.info()),
                Program::SchedClassifier(program) => program.load().and_then(|()| program.info()),
                _ => bail!("{name} is of a type that this suite does not load"),
            };
            let info = match info {
                Ok(info) => info,
                Err(error) => {
                    println!("{label}: refused");
                    return Err(anyhow::Error::from(error)
                        .context(format!("load {label}{}", self.reason(&bytes, name)?)));
                }
            };
            let figures = Figures {
                verified: info.verified_instruction_count().unwrap_or(0),
                translated_bytes: info.size_translated().unwrap_or(0),
                jited_bytes: info.size_jitted(),
                name: label,
            };
            println!("{}: {}", figures.name, figures.verified);
            all.push(figures);
        }
        Ok(all)
    }

    /// Asks again why a program is refused, with a log, if somebody wants it.
    fn reason(&self, bytes: &[u8], name: &str) -> Result<String> {
        let Some(dir) = env::var_os("LB_VERIFIER_LOG") else {
            return Ok(" (LB_VERIFIER_LOG=DIR has the verifier's reasons written there)".into());
        };
        let mut bpf = self.loader(VerifierLogLevel::VERBOSE).load(bytes)?;
        let log = match bpf.program_mut(name) {
            Some(Program::Xdp(program)) => program.load().map_err(|error| format!("{error}")),
            Some(Program::SchedClassifier(program)) => program.load().map_err(|error| format!("{error}")),
            _ => Ok(()),
        };
        let log = log.err().unwrap_or_default();
        let path = std::path::Path::new(&dir).join(format!("{name}.log"));
        std::fs::write(&path, &log).with_context(|| format!("write {}", path.display()))?;
        let last: Vec<&str> = log.lines().rev().filter(|line| !line.trim().is_empty()).take(4).collect();
        Ok(format!(
            ": {} (all of it in {})",
            last.into_iter().rev().collect::<Vec<_>>().join(" | "),
            path.display()
        ))
    }
}

/// The object with its programs in sections `xdp` instead of `xdp.frags`, by which aya knows not to ask for fragments.
pub fn without_frags(object: &[u8]) -> Vec<u8> {
    const NAME: &[u8] = b"xdp.frags\0";
    let mut bytes = object.to_vec();
    let places: Vec<usize> = (0..bytes.len().saturating_sub(NAME.len()))
        .filter(|at| &bytes[*at..*at + NAME.len()] == NAME)
        .collect();
    for at in places {
        bytes[at + 3] = 0;
    }
    bytes
}

/// The object that `LB_VERIFIER_INGRESS` names.
fn other_object() -> Result<Option<Vec<u8>>> {
    let Some(path) = env::var_os("LB_VERIFIER_INGRESS").map(std::path::PathBuf::from) else {
        return Ok(None);
    };
    std::fs::read(&path)
        .map(Some)
        .with_context(|| format!("cannot read LB_VERIFIER_INGRESS={}", path.display()))
}

/// Loads the programs of an ingress host with each combination of settings.
pub fn ingress(plan: &Plan) -> Result<Vec<Figures>> {
    let mut all = Vec::new();
    let other = other_object()?;
    let kernel = plan.kernel();
    let programs =
        [names::PROGRAM_INGRESS].into_iter().chain(names::stage::INGRESS_PROGRAMS.map(|(name, _)| name));
    let programs: Vec<&str> = programs.filter(|name| plan.takes(name)).collect();
    for bits in if plan.is_short { 15..16u8 } else { 0..16 } {
        for log in LOG_LEVELS {
            let on = |bit: u8| bits >> bit & 1;
            let (ipv6, vlan, stats, icmp) = (on(0), on(1), on(2), on(3));
            let icmp_per_s = u32::from(icmp) * IngressSettings::DEFAULT.icmp_per_s;
            let settings =
                IngressSettings { ipv6, vlan, stats, icmp_per_s, kernel, ..IngressSettings::DEFAULT };
            let name = format!("ipv6={ipv6} vlan={vlan} stats={stats} icmp={icmp} log={log}");
            let object = Object {
                bytes: other.as_deref().unwrap_or(lb_userspace::apply::objects::INGRESS),
                settings: Some(settings),
                log,
                has_frags: kernel & kernel::FRAGS != 0,
            };
            all.append(&mut object.load(&programs, &name)?);
        }
    }
    Ok(all)
}

/// Loads the worker's programs with each combination of settings.
pub fn decap(plan: &Plan) -> Result<Vec<Figures>> {
    let mut all = Vec::new();
    let kernel = plan.kernel();
    for bits in if plan.is_short { 3..4u8 } else { 0..4 } {
        for log in LOG_LEVELS {
            let (ipv6, vlan) = (bits & 1, bits >> 1);
            let object = Object {
                bytes: lb_userspace::apply::objects::DECAP,
                settings: Some(DecapSettings { ipv6, vlan, kernel, ..DecapSettings::DEFAULT }),
                log,
                has_frags: kernel & kernel::FRAGS != 0,
            };
            let takes: Vec<&str> =
                [names::PROGRAM_DECAP].into_iter().filter(|name| plan.takes(name)).collect();
            all.append(&mut object.load(&takes, &format!("ipv6={ipv6} vlan={vlan} log={log}"))?);
            if bits == 3 && log == 0 {
                // No setting changes these.
                let stages = names::stage::DECAP_PROGRAMS.map(|(name, _)| name);
                let stages: Vec<&str> = stages.into_iter().filter(|name| plan.takes(name)).collect();
                all.append(&mut object.load(&stages, "")?);
            }
        }
    }
    Ok(all)
}

/// Loads the programs that health probes pass; they have no settings.
pub fn probe(plan: &Plan) -> Result<Vec<Figures>> {
    let object = Object::<DecapSettings> {
        bytes: lb_userspace::apply::objects::PROBE,
        settings: None,
        log: 0,
        has_frags: true,
    };
    let programs = [names::PROGRAM_PROBE_OUT, names::PROGRAM_PROBE_IN];
    let programs: Vec<&str> = programs.into_iter().filter(|name| plan.takes(name)).collect();
    object.load(&programs, "")
}
