//! Runs the simulation. This program replaces two functions of the C library, `clock_gettime` and `getrandom`, for
//! threads that simulate: so every clock and every random number of all code in it, of dependencies too, comes from the
//! seed. Other threads get the kernel's.

use libc::{c_int, c_uint, c_void, clockid_t, size_t, ssize_t, timespec};
use std::process::ExitCode;
use test_simulation::environment;

/// The simulated time on threads that simulate.
///
/// # Safety
/// As the function of the C library: `time` points to a writable `timespec`.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let simulated = match clock {
        libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME => environment::boot_time(),
        libc::CLOCK_REALTIME => environment::wall_time(),
        _ => None,
    };
    match simulated {
        Some(now) => {
            let value = timespec { tv_sec: now.as_secs() as _, tv_nsec: now.subsec_nanos().into() };
            // SAFETY: `time` is writable, by the function's contract.
            unsafe { time.write(value) };
            0
        }
        // SAFETY: The kernel checks the pointer.
        None => unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) as c_int },
    }
}

/// Random bytes from the seed on threads that simulate.
///
/// # Safety
/// As the function of the C library: `buffer` points to `length` writable bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: size_t, flags: c_uint) -> ssize_t {
    if length == 0 || !environment::is_simulated() {
        // SAFETY: The kernel checks the pointer.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as ssize_t };
    }
    // SAFETY: `buffer` has `length` writable bytes, by the function's contract.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast(), length) };
    environment::fill_random(bytes);
    length as ssize_t
}

fn main() -> ExitCode {
    test_simulation::main()
}
