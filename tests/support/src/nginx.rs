//! A real HTTP worker: nginx, which says its name in every reply.
//!
//! `/` answers with the name; `/big` is 1 GiB of zeros; `/slow` the same at
//! 256 KiB a second; `/download/N` are N MiB at that rate; `/upload` reads the
//! whole request before it answers with the name.

use std::{
    fs::{self, File},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::{netns::Namespace, process::Process};

/// The port of the workers' HTTP service.
pub const PORT: u16 = 80;
const BIG_BYTES: u64 = 1 << 30;
/// Sizes that `/download/N` offers, in MiB.
const DOWNLOADS_MIB: [u64; 4] = [1, 2, 4, 8];

/// Starts nginx, called `name`, in `namespace`, with its files under
/// `directory`; returns once it accepts connections.
pub fn start(namespace: &Namespace, name: &str, directory: &Path) -> Result<Process> {
    let home = directory.join(format!("nginx-{name}"));
    fs::create_dir_all(home.join("files/download"))
        .with_context(|| format!("cannot create {}", home.display()))?;
    // Sparse: they take no memory.
    File::create(home.join("files/big"))?.set_len(BIG_BYTES)?;
    for mib in DOWNLOADS_MIB {
        File::create(home.join(format!("files/download/{mib}")))?.set_len(mib << 20)?;
    }
    let configuration = home.join("nginx.conf");
    fs::write(&configuration, configure(name, &home))
        .with_context(|| format!("cannot write {}", configuration.display()))?;

    let log = home.join("error.log");
    let mut command = namespace.command("nginx");
    command.arg("-p").arg(&home).arg("-e").arg(&log).arg("-c").arg(&configuration);
    let mut process = Process::spawn(&format!("nginx {name}"), command, &log)?;
    let what = format!("nginx {name} accepts connections");
    process.wait_ready(&what, Duration::from_secs(10), || is_listening(namespace))?;
    Ok(process)
}

fn is_listening(namespace: &Namespace) -> bool {
    let address = (std::net::Ipv4Addr::LOCALHOST, PORT);
    namespace.enter(move || std::net::TcpStream::connect(address).is_ok()).unwrap_or(false)
}

/// One process (no master), so that killing its id kills the worker.
fn configure(name: &str, home: &Path) -> String {
    let home = home.display();
    format!(
        r#"daemon off;
master_process off;
pid {home}/pid;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    default_type text/plain;
    keepalive_timeout 600s;
    keepalive_requests 10000000;
    reset_timedout_connection on;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    client_max_body_size 0;
    add_header X-Worker {name} always;
    server {{
        listen 0.0.0.0:{PORT} backlog=4096;
        listen [::]:{PORT} backlog=4096;
        root {home}/files;
        location = / {{ return 200 "{name}\n"; }}
        location = /slow {{ alias {home}/files/big; limit_rate 256k; }}
        location /download/ {{ limit_rate 256k; }}
        location = /upload {{ proxy_pass http://127.0.0.1:8081/; }}
    }}
    server {{
        listen 127.0.0.1:8081;
        location / {{ return 200 "{name}\n"; }}
    }}
}}
"#
    )
}
