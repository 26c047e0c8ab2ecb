//! Fuzzes `lb_fuzz::bodies::stages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_fuzz::bodies::stages::check(data));
