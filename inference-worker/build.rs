//! Gives the binary and its tests an rpath to the libtorch they were linked with, so that they run
//! without LD_LIBRARY_PATH. A copy beside the binary (`lib/`, as `cargo xtask dist` lays it) comes first.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/lib");
    match std::env::var("DEP_TCH_LIBTORCH_LIB") {
        Ok(lib) => println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}"),
        Err(_) => {
            println!("cargo:warning=libtorch's folder is unknown: set LD_LIBRARY_PATH to run the worker")
        }
    }
}
