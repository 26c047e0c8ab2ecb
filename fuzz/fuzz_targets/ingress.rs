//! Fuzzes `lb_fuzz::bodies::ingress`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lb_fuzz::bodies::ingress::check(data));
