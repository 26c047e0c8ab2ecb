//! Abilities of the running kernel, determined by trying and never guessed from its version: distributions add features
//! to old versions, and administrators switch some off.
//!
//! The results go into the read-only setting `kernel` of each program, so that the verifier removes code that uses
//! what the kernel lacks.

use super::sys;
use lb_common::names::stage::TRIAL;
use serde::Serialize;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::OnceLock,
};

/// Major and minor version in a kernel's release, such as `6.1.0-56-amd64`; None if there is none. For messages.
pub fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(['.', '-', '+']).map_while(|number| number.parse().ok());
    numbers.next().zip(numbers.next())
}

/// `BPF_PROG_TYPE_SCHED_CLS`.
const SCHED_CLS: u32 = 3;
/// `BPF_PROG_TYPE_XDP`.
const XDP: u32 = 6;
/// `BPF_XDP`, an attach type.
pub const BPF_XDP: u32 = 37;
/// `BPF_TCX_INGRESS`, an attach type.
const TCX_INGRESS: u32 = 46;
/// `BPF_F_XDP_HAS_FRAGS`: the program supports packets whose data is in several pieces.
const HAS_FRAGS: u32 = 1 << 5;
/// `BPF_FIB_LOOKUP_SRC`.
const FIB_LOOKUP_SRC: i32 = 1 << 4;

const HELPER_FIB_LOOKUP: i32 = 69;
const HELPER_COARSE_CLOCK: i32 = 160;
const HELPER_CHECK_MTU: i32 = 163;
const HELPER_GET_BUFF_LEN: i32 = 188;
const XDP_PASS: i32 = 2;

/// Kernel features that our programs, links or tools depend on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KernelFeatures {
    /// XDP programs can support packets in several pieces, and query their length (Linux 5.18).
    pub frags: bool,
    /// `bpf_fib_lookup` returns the source address (Linux 6.7).
    pub fib_src: bool,
    /// The coarse clock (Linux 5.11).
    pub coarse_clock: bool,
    /// `bpf_check_mtu` (Linux 5.12).
    pub check_mtu: bool,
    /// Programs attach to tc by links (tcx, Linux 6.6): health checks through tunnels need it.
    pub tcx: bool,
}

impl KernelFeatures {
    /// Features of the running kernel, tried once per process.
    pub fn get() -> Self {
        static KERNEL: OnceLock<KernelFeatures> = OnceLock::new();
        *KERNEL.get_or_init(Self::probe)
    }

    fn probe() -> Self {
        let frags = [instruction(CALL, 0, 0, HELPER_GET_BUFF_LEN), MOVE_PASS, EXIT];
        Self {
            frags: sys::load_program(XDP, BPF_XDP, HAS_FRAGS, &frags).is_ok(),
            fib_src: knows_fib_flag(FIB_LOOKUP_SRC).unwrap_or(false),
            coarse_clock: has_coarse_clock(),
            check_mtu: has_check_mtu(),
            tcx: has_tcx().unwrap_or(false),
        }
    }

    /// Bits of the programs' setting `kernel`. `frags`: whether the programs are loaded with that flag.
    pub fn bits(self, frags: bool) -> u32 {
        use lb_common::settings::kernel;
        let mut bits = 0;
        if frags {
            bits |= kernel::FRAGS;
        }
        for (has, bit) in [
            (self.fib_src, kernel::FIB_SRC),
            (self.coarse_clock, kernel::COARSE_CLOCK),
            (self.check_mtu, kernel::CHECK_MTU),
        ] {
            if has {
                bits |= bit;
            }
        }
        bits
    }

    /// Names of the features, and whether this kernel has them.
    pub fn list(self) -> [(&'static str, bool); 5] {
        [
            ("frags", self.frags),
            ("fib-source", self.fib_src),
            ("coarse-clock", self.coarse_clock),
            ("check-mtu", self.check_mtu),
            ("tcx", self.tcx),
        ]
    }
}

const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const STORE_WORD: u8 = 0x62;
const STORE_DOUBLE: u8 = 0x7a;
const CALL: u8 = 0x85;
const EXIT: u64 = instruction(0x95, 0, 0, 0);
const MOVE_PASS: u64 = instruction(MOVE, 0, 0, XDP_PASS);

/// One instruction in the kernel's format; `registers`: source and destination, four bits each.
const fn instruction(code: u8, registers: u8, offset: i16, immediate: i32) -> u64 {
    code as u64 | (registers as u64) << 8 | (offset as u16 as u64) << 16 | (immediate as u32 as u64) << 32
}

/// Whether `bpf_fib_lookup` accepts a flag. It checks the flags before the address family, which is invalid
/// here: EINVAL means that it does not know the flag, EAFNOSUPPORT that it does.
fn knows_fib_flag(flag: i32) -> io::Result<bool> {
    const PARAMS: i16 = 64;
    const R1_PACKET: [u8; 64] = [0; 64];
    let mut code: Vec<u64> =
        (1..=PARAMS / 8).map(|word| instruction(STORE_DOUBLE, 0x0a, -8 * word, 0)).collect();
    code.extend([
        instruction(MOVE_REGISTER, 0xa2, 0, 0),
        instruction(ADD, 0x02, 0, -i32::from(PARAMS)),
        instruction(MOVE, 0x03, 0, i32::from(PARAMS)),
        instruction(MOVE, 0x04, 0, flag),
        instruction(CALL, 0, 0, HELPER_FIB_LOOKUP),
        EXIT,
    ]);
    let program = sys::load_program(XDP, BPF_XDP, 0, &code)?;
    let answer = sys::test_run(&program, &R1_PACKET)?.cast_signed();
    Ok(answer == -libc::EAFNOSUPPORT)
}

fn has_coarse_clock() -> bool {
    let code = [instruction(CALL, 0, 0, HELPER_COARSE_CLOCK), MOVE_PASS, EXIT];
    sys::load_program(XDP, BPF_XDP, 0, &code).is_ok()
}

fn has_check_mtu() -> bool {
    let code = [
        instruction(STORE_WORD, 0x0a, -4, 0),
        instruction(MOVE, 0x02, 0, 0),
        instruction(MOVE_REGISTER, 0xa3, 0, 0),
        instruction(ADD, 0x03, 0, -4),
        instruction(MOVE, 0x04, 0, 0),
        instruction(MOVE, 0x05, 0, 0),
        instruction(CALL, 0, 0, HELPER_CHECK_MTU),
        MOVE_PASS,
        EXIT,
    ];
    sys::load_program(XDP, BPF_XDP, 0, &code).is_ok()
}

/// Whether programs attach to tc by links. No interface has index 0: a kernel that looks it up knows the attach type.
fn has_tcx() -> io::Result<bool> {
    let code = [instruction(MOVE, 0, 0, 0), EXIT];
    let program = sys::load_program(SCHED_CLS, 0, 0, &code)?;
    match sys::create_link(&program, 0, TCX_INGRESS, 0) {
        Err(error) => Ok(error.raw_os_error() == Some(libc::ENODEV)),
        Ok(_) => Ok(true),
    }
}

/// Loads a program that passes every packet, with or without the frags flag.
pub fn trial_program(frags: bool) -> io::Result<OwnedFd> {
    sys::load_program(XDP, BPF_XDP, if frags { HAS_FRAGS } else { 0 }, &[MOVE_PASS, EXIT])
}

/// Whether the kernel compiles programs to machine code.
///
/// # Errors
/// No program can be loaded.
pub fn is_jitted() -> io::Result<bool> {
    sys::is_jitted(&trial_program(false)?)
}

/// Whether a program array accepts programs like this one: the kernel wants all of an array alike in the frags flag.
/// Tried at an index that is never called. An array that never held a program accepts any, and is then fixed to its kind.
pub fn fits(array: &impl AsFd, program: &impl AsFd) -> io::Result<bool> {
    let key = TRIAL.to_ne_bytes();
    let value = program.as_fd().as_raw_fd().to_ne_bytes();
    match sys::update(array, &key, &value, 0) {
        Ok(_) => sys::delete(array, &key).map(|()| true),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instructions_have_the_kernels_format() {
        assert_eq!(EXIT.to_le_bytes(), [0x95, 0, 0, 0, 0, 0, 0, 0]);
        let store = instruction(STORE_DOUBLE, 0x0a, -8, 0);
        assert_eq!(store.to_le_bytes(), [0x7a, 0x0a, 0xf8, 0xff, 0, 0, 0, 0]);
        assert_eq!(instruction(ADD, 2, 0, -64).to_le_bytes(), [7, 2, 0, 0, 0xc0, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn programs_are_told_what_they_may_use() {
        use lb_common::settings::kernel::{FIB_SRC, FRAGS};
        let old = KernelFeatures::default();
        assert_eq!(old.bits(false), 0);
        let new = KernelFeatures { frags: true, fib_src: true, tcx: true, ..old };
        assert_eq!(new.bits(false), FIB_SRC, "a kernel that has frags, programs without it");
        assert_eq!(new.bits(true), FIB_SRC | FRAGS);
    }
}
