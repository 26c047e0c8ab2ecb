//! A real network in one kernel: namespaces joined by veth pairs, real workers,
//! real clients, and the daemons under test.
//!
//! In: a layout. Out: a [`bed::Bed`] that is gone when it is dropped, and load
//! whose every request is accounted for. Used by `cargo xtask demo` and by the
//! suites that need root (`tests/*`). Nothing here sleeps for luck: whatever
//! takes time is waited for by its condition.

pub mod bed;
pub mod bird;
pub mod chained;
pub mod check;
pub mod daemon;
pub mod etcd;
pub mod flood;
pub mod hold;
pub mod http;
pub mod iperf;
pub mod llm;
pub mod mirror;
pub mod netns;
pub mod nginx;
pub mod nics;
pub mod pair;
pub mod process;
pub mod program;
pub mod quic;
pub mod raw;
pub mod regions;
pub mod replica;
pub mod stage;
pub mod story;
pub mod udp;
pub mod wait;

use std::{fs::File, io::Write, path::Path};

/// Notes that the running test cannot do its work here: `name` is what CI's list
/// of expected skips knows it by, `reason` is for people. The test then returns.
pub fn skip(name: &str, reason: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/skipped.log");
    let written = File::options()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "{name}\t{test}: {reason}"));
    assert!(written.is_ok(), "{}: {written:?}", path.display());
}
