//! Fuzzes `lb_fuzz::bodies::decap`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_fuzz::bodies::decap::check(data));
