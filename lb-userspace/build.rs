//! Builds the XDP programs, so that `lbd` carries them: one file to install.
//!
//! In: `lb-ebpf`, `lb-common`, a BPF tool chain. Out: `$OUT_DIR/ingress`,
//! `$OUT_DIR/decap` and `$OUT_DIR/probe`. With `LB_SKIP_BPF=1` all are empty, for work on machines
//! without the tool chain; `lbd` then refuses to attach.

use std::{env, fs, path::PathBuf, process::exit};

#[path = "../xtask/src/toolchain/bpf.rs"]
#[allow(dead_code, reason = "xtask uses the rest")]
mod bpf;

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
    let workspace = crate_dir.parent().expect("the crate lies in the workspace").to_path_buf();
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));

    println!("cargo::rerun-if-env-changed=LB_SKIP_BPF");
    for path in WATCHED {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }

    if env::var_os("LB_SKIP_BPF").is_some_and(|value| value == "1") {
        println!("cargo::warning=LB_SKIP_BPF=1: lbd is built without its XDP programs and will not attach");
        for program in bpf::PROGRAMS {
            fs::write(out_dir.join(program), []).expect("OUT_DIR is writable");
        }
        return;
    }

    let is_other = env::var_os("CARGO_FEATURE_OTHER_ABI").is_some();
    let with_features =
        |toolchain| bpf::Toolchain { features: if is_other { "bpf,other-abi" } else { "bpf" }, ..toolchain };
    match bpf::find()
        .map(with_features)
        .and_then(|toolchain| toolchain.build(&workspace, &out_dir.join("bpf")))
    {
        Ok((objects, warnings)) => {
            for warning in warnings {
                println!("cargo::warning={warning}");
            }
            for (program, object) in bpf::PROGRAMS.iter().zip(objects) {
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
