//! Installs the programs that the demo and the tests run.

use anyhow::{Result, bail};

use super::apt;
use crate::shell;

/// A program, and the sets of packages that provide it, of which the first available one is installed.
struct Wanted {
    program: &'static str,
    packages: &'static [&'static [&'static str]],
}

const fn one(program: &'static str, packages: &'static [&'static [&'static str]]) -> Wanted {
    Wanted { program, packages }
}

const WANTED: &[Wanted] = &[
    one("cc", &[&["gcc", "libc6-dev"]]),
    one("curl", &[&["curl", "ca-certificates"]]),
    one("ip", &[&["iproute2"]]),
    one("ping", &[&["iputils-ping"]]),
    one("ethtool", &[&["ethtool"]]),
    one("nginx", &[&["nginx-light"], &["nginx"]]),
    one("iperf3", &[&["iperf3"]]),
    one("wrk", &[&["wrk"]]),
    one("bpftool", &[&["bpftool"], &["linux-tools-common", "linux-tools-generic"]]),
    one("haproxy", &[&["haproxy"]]),
    // A path works like a program's name.
    one("/usr/lib/nginx/modules/ngx_stream_module.so", &[&["libnginx-mod-stream"]]),
    one("nft", &[&["nftables"]]),
    one("nsenter", &[&["util-linux"]]),
    one("etcd", &[&["etcd-server"]]),
    one("etcdctl", &[&["etcd-client"]]),
    one("bird", &[&["bird2"]]),
    one("openssl", &[&["openssl"]]),
    one("python3", &[&["python3"]]),
];

/// Installs the packages of every missing program.
pub fn install() -> Result<String> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(format!("all {} found", WANTED.len()));
    }
    if !apt::is_available() {
        let names: Vec<&str> = missing.iter().map(|wanted| wanted.program).collect();
        bail!(
            "{} not found, and apt is not available: install them with your package manager",
            names.join(", ")
        );
    }
    apt::refresh()?;
    let mut packages = Vec::new();
    let mut unknown = Vec::new();
    for wanted in &missing {
        match wanted.packages.iter().find(|set| set.iter().all(|package| apt::offers(package))) {
            Some(set) => packages.extend_from_slice(set),
            None => unknown.push(wanted.program),
        }
    }
    if !packages.is_empty() {
        apt::install(&packages)?;
    }
    if !unknown.is_empty() {
        bail!("no package provides {}: add a package source that does", unknown.join(", "));
    }
    match self::missing().as_slice() {
        [] => Ok(format!("installed {}", packages.join(", "))),
        [first, ..] => bail!("{} is still missing after installing {packages:?}", first.program),
    }
}

fn missing() -> Vec<&'static Wanted> {
    WANTED.iter().filter(|wanted| shell::which(wanted.program).is_none()).collect()
}
