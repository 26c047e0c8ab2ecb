//! `lbctl config import`.

use super::{Exit, Failure, words::word, write_stderr};
use crate::{
    desired::{config::File, model::ForwardingMode},
    lbctl::{
        import::{ImportOptions, Origin, import},
        render::Out,
    },
};
use clap::{Args, ValueEnum, builder::PossibleValue};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Arguments of `config import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// Load balancer that the file belongs to
    #[arg(value_enum)]
    from: Origin,
    /// File, or - for standard input
    file: PathBuf,
    /// VIP of services whose file names no address: `bind *:443` of HAProxy, firewall marks of IPVS
    #[arg(long, value_name = "ADDRESS")]
    vip: Option<IpAddr>,
    /// Forwarding mode of all services: ipip, gue, l2, nat or local (default: that of the file; for HAProxy nat where a
    /// server's port differs, else ipip)
    #[arg(long, value_parser = word::<ForwardingMode>)]
    mode: Option<ForwardingMode>,
    /// Text that the names of all services begin with
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true, value_parser = prefix)]
    name_prefix: String,
}

impl ValueEnum for Origin {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Ipvsadm, Self::Keepalived, Self::Haproxy, Self::Katran]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            Self::Ipvsadm => ("ipvsadm", "Output of `ipvsadm -S -n`, or a script of ipvsadm commands"),
            Self::Keepalived => ("keepalived", "keepalived.conf: virtual_server blocks"),
            Self::Haproxy => ("haproxy", "haproxy.cfg: listen, frontend and backend sections"),
            Self::Katran => ("katran", "Script of katran_goclient commands, or the output of its -l"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

fn prefix(text: &str) -> Result<String, String> {
    let is_start = text.is_empty() || text.starts_with(|c: char| c.is_ascii_alphanumeric());
    let is_name = text.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if is_start && is_name && text.len() <= 40 {
        Ok(text.to_owned())
    } else {
        Err("give at most 40 letters, digits, '.', '_' or '-', a letter or digit first".to_owned())
    }
}

/// Reads a configuration of another load balancer and prints ours, without contacting lbd.
pub fn run(out: &mut Out<'_>, args: &ImportArgs) -> Result<Exit, Failure> {
    let is_stdin = args.file == Path::new("-");
    let name = if is_stdin { "standard input".to_owned() } else { args.file.display().to_string() };
    let bytes = if is_stdin {
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes).map(|_| bytes)
    } else {
        std::fs::read(&args.file)
    };
    let bytes = bytes.map_err(|e| Failure::Refused {
        what: format!("cannot read {name}: {e}"),
        fix: None,
        details: Vec::new(),
    })?;
    // Comments in other encodings are common in old files, and harmless.
    let text = String::from_utf8_lossy(&bytes);
    let options = ImportOptions { vip: args.vip, mode: args.mode, name_prefix: args.name_prefix.clone() };
    let imported = import(args.from, &text, &options).map_err(|e| Failure::Usage {
        what: crate::printable::escape(&format!("{name}:{e}")).into_owned(),
    })?;
    let config = imported.to_toml(args.from, &name);
    // The rules of `config check` have been applied; this proves that the text says the same.
    if let Err(problems) = File::parse(&config) {
        let what = problems.first().map_or(String::new(), |p| p.what.clone());
        return Err(Failure::Internal(format!(
            "the result of the import is not valid, which is a mistake in lbctl: {what}"
        )));
    }
    if out.json {
        out.json(&serde_json::json!({ "config": config, "notes": imported.notes }), false)?;
    } else {
        out.raw(config.as_bytes())?;
        // Data first, so that a terminal shows the notes below it.
        out.flush()?;
        let lines: Vec<String> = imported.notes.iter().map(|note| note.line_of(&name) + "\n").collect();
        write_stderr(&format!("{}{}\n", lines.concat(), imported.summary()));
    }
    Ok(if imported.notes.is_empty() { Exit::Ok } else { Exit::No })
}
