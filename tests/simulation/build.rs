//! Exports the functions of the C library that the simulation replaces, so that code which looks them up by name finds
//! these too.

fn main() {
    for symbol in ["getrandom", "clock_gettime"] {
        println!("cargo:rustc-link-arg-tests=-Wl,--export-dynamic-symbol={symbol}");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
