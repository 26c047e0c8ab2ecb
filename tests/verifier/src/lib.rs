//! Loads each program with each combination of settings that can be shipped, and compares what the
//! verifier had to walk with `budget.txt`. Settings are read-only globals, so each combination is another
//! program to the verifier. Needs root. The tests are in `tests/`.

use anyhow::{Context, Result};
use aya::{
    EbpfLoader,
    programs::{SchedClassifier, Xdp},
};
use lb_common::{
    names,
    settings::{DecapSettings, IngressSettings},
};
use test_packet::{Decap, Ingress};

/// What the kernel says of a loaded program.
#[derive(Clone, Debug)]
pub struct Figures {
    /// Program and settings, as `budget.txt` names them.
    pub name: String,
    /// Instructions that the verifier walked, all paths together.
    pub verified: u32,
    /// Bytes of BPF instructions after the verifier's rewriting.
    pub translated_bytes: u32,
    /// Bytes of machine code.
    pub jited_bytes: u32,
}

/// Log levels that are shipped: none, and all.
const LOG_LEVELS: [u8; 2] = [0, 5];

fn figures(name: String, program: &Xdp) -> Result<Figures> {
    let info = program.info().context("ask about the program")?;
    Ok(Figures {
        name,
        verified: info.verified_instruction_count().context("the kernel does not count (older than 5.16)")?,
        translated_bytes: info.size_translated().context("no translated size")?,
        jited_bytes: info.size_jitted(),
    })
}

/// Loads the ingress program with each combination of settings.
pub fn ingress() -> Result<Vec<Figures>> {
    let mut all = Vec::new();
    for bits in 0..16u8 {
        for log in LOG_LEVELS {
            let on = |bit: u8| bits >> bit & 1;
            let (ipv6, vlan, stats, icmp) = (on(0), on(1), on(2), on(3));
            let icmp_per_s = u32::from(icmp) * IngressSettings::DEFAULT.icmp_per_s;
            let settings = IngressSettings { ipv6, vlan, stats, icmp_per_s, ..IngressSettings::DEFAULT };
            let name = format!("ipv6={ipv6} vlan={vlan} stats={stats} icmp={icmp} log={log}");
            let loaded = Ingress::load_with(settings, log).with_context(|| format!("load with {name}"))?;
            all.push(figures(format!("ingress {name}"), loaded.program())?);
            for (stage, _) in names::stage::INGRESS_PROGRAMS {
                all.push(figures(format!("{stage} {name}"), loaded.program_named(stage))?);
            }
        }
    }
    Ok(all)
}

/// Loads the decap program with each combination of settings.
pub fn decap() -> Result<Vec<Figures>> {
    let mut all = Vec::new();
    for bits in 0..4u8 {
        for log in LOG_LEVELS {
            let (ipv6, vlan) = (bits & 1, bits >> 1);
            let settings = DecapSettings { ipv6, vlan, ..DecapSettings::DEFAULT };
            let name = format!("ipv6={ipv6} vlan={vlan} log={log}");
            let loaded = Decap::load_with(settings, log, &[], &[]).with_context(|| format!("load {name}"))?;
            all.push(figures(format!("decap {name}"), loaded.program())?);
            if bits == 0 && log == 0 {
                // No setting changes these.
                for (stage, _) in names::stage::DECAP_PROGRAMS {
                    all.push(figures(stage.to_owned(), loaded.program_named(stage))?);
                }
            }
        }
    }
    Ok(all)
}

/// Loads the programs that health probes pass; they have no settings.
pub fn probe() -> Result<Vec<Figures>> {
    let mut bpf = EbpfLoader::new().load(lb_userspace::objects::PROBE)?;
    let mut all = Vec::new();
    for name in [names::PROGRAM_PROBE_OUT, names::PROGRAM_PROBE_IN] {
        let program: &mut SchedClassifier =
            bpf.program_mut(name).context("a program of the object")?.try_into()?;
        program.load().with_context(|| format!("load {name}"))?;
        let info = program.info().context("ask about the program")?;
        all.push(Figures {
            name: name.to_owned(),
            verified: info
                .verified_instruction_count()
                .context("the kernel does not count (older than 5.16)")?,
            translated_bytes: info.size_translated().context("no translated size")?,
            jited_bytes: info.size_jitted(),
        });
    }
    Ok(all)
}

/// The budget of a program, in verified instructions.
pub fn budget(file: &str, name: &str) -> Option<u32> {
    file.lines()
        .filter(|line| !line.starts_with('#'))
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':')?.trim().parse().ok())
}

/// Compares figures with budgets: a table for people, and what is wrong.
pub fn compare(file: &str, figures: &[Figures]) -> (String, Vec<String>) {
    let mut table =
        format!("{:>9} {:>9} {:>10} {:>8}  program\n", "verified", "budget", "translated", "jited");
    let mut wrong = Vec::new();
    for f in figures {
        let budget = budget(file, &f.name);
        let shown = budget.map_or("none".to_owned(), |budget| budget.to_string());
        table += &format!(
            "{:>9} {:>9} {:>10} {:>8}  {}\n",
            f.verified, shown, f.translated_bytes, f.jited_bytes, f.name
        );
        match budget {
            None => wrong.push(format!("{}: no budget; it takes {}", f.name, f.verified)),
            Some(budget) if f.verified > budget => wrong.push(format!(
                "{}: the verifier walks {} instructions, {} more than its budget of {budget}",
                f.name,
                f.verified,
                f.verified - budget
            )),
            Some(_) => {}
        }
    }
    (table, wrong)
}
