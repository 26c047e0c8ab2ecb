//! Fuzzes `lb_fuzz::bodies::chance`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_fuzz::bodies::chance::check(data));
