//! Builds the XDP programs as they ship, and beside them the wrapper that measures them.
//!
//! In: `lb-ebpf`, `lb-common`, a BPF tool chain. Out: `$OUT_DIR/{ingress,decap,rewind}`, empty with
//! `LB_SKIP_BPF=1` (for work on machines without the tool chain).

use std::{env, fs, path::PathBuf, process::exit};

#[path = "../../xtask/src/toolchain/bpf.rs"]
#[allow(dead_code, reason = "xtask uses the rest")]
mod bpf;

const PROGRAMS: [&str; 3] = ["ingress", "decap", "rewind"];
const WATCHED: [&str; 6] = [
    "lb-ebpf/src",
    "lb-ebpf/Cargo.toml",
    "lb-common/src",
    "lb-common/Cargo.toml",
    "Cargo.lock",
    "xtask/src/toolchain/bpf.rs",
];

fn main() {
    let crate_dir = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let workspace = crate_dir.join("../..");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo::rerun-if-env-changed=LB_SKIP_BPF");
    for path in WATCHED {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    if env::var_os("LB_SKIP_BPF").is_some_and(|value| value == "1") {
        for program in PROGRAMS {
            fs::write(out_dir.join(program), []).expect("OUT_DIR is writable");
        }
        return;
    }
    let built =
        bpf::find().and_then(|toolchain| toolchain.build_these(&PROGRAMS, &workspace, &out_dir.join("bpf")));
    match built {
        Ok((objects, _)) => {
            for (program, object) in PROGRAMS.iter().zip(objects) {
                if let Err(error) = fs::copy(&object, out_dir.join(program)) {
                    println!("cargo::error=cannot copy {}: {error}", object.display());
                }
            }
        }
        Err(error @ bpf::Error::Failed { .. }) => {
            eprintln!("{error}");
            exit(1);
        }
        Err(error) => println!("cargo::error={error}"),
    }
}
