//! Adds an rpath to the libtorch of the build, so that the binary and its tests run without LD_LIBRARY_PATH. A copy in
//! `lib/` beside the binary, where `cargo xtask dist` puts it, comes first.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/lib");
    match std::env::var("DEP_TCH_LIBTORCH_LIB") {
        Ok(lib) => println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}"),
        Err(_) => {
            println!(
                "cargo:warning=the directory of libtorch is unknown: set LD_LIBRARY_PATH to run the worker"
            )
        }
    }
}
