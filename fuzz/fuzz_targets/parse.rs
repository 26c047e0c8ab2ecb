//! Fuzzes `lb_fuzz::bodies::parse`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_fuzz::bodies::parse::check(data));
