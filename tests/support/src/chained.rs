//! A user's own XDP program, chained before or after the balancer's by its place in the pinned `STAGES`:
//! written in the kernel's instruction format, as [`crate::program`]'s are. It knows nothing of `lbd`.

use std::{
    ffi::CString,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use anyhow::{Context, Result};

use crate::program::{BPF_F_XDP_HAS_FRAGS, BPF_PROG_TYPE_XDP, BPF_XDP, bpf, call, instruction, load};

const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_DELETE_ELEM: libc::c_long = 3;
const BPF_OBJ_GET: libc::c_long = 7;

const MOVE: u8 = 0xb7;
const MOVE_REGISTER: u8 = 0xbf;
const ADD: u8 = 0x07;
const LOAD_WORD: u8 = 0x61;
const LOAD_HALF: u8 = 0x69;
const LOAD_MAP: u8 = 0x18;
const JUMP_IF_ABOVE: u8 = 0x2d;
const JUMP_IF_NOT: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const TAIL_CALL: u32 = 12;
const DROP: u32 = 1;
const PASS: u32 = 2;

/// Places as docs/operate/chain.md gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before ours.
    Before = 0,
    /// After ours, for what goes to the host.
    After = 5,
}
/// Where a program that stands before ours goes on.
const OURS: u32 = 6;

/// A firewall that drops untagged IPv4 packets to one TCP or UDP port.
#[derive(Debug)]
pub struct Firewall {
    stages: OwnedFd,
    place: Place,
    _program: OwnedFd,
}

impl Firewall {
    /// Puts it in its place of the `STAGES` pinned in `pin_path`.
    pub fn start(pin_path: &Path, place: Place, port: u16) -> Result<Self> {
        #[repr(C)]
        struct Get {
            path: u64,
            fd: u32,
            flags: u32,
        }
        let path = CString::new(pin_path.join("STAGES").as_os_str().as_encoded_bytes())?;
        let stages = bpf(BPF_OBJ_GET, &Get { path: path.as_ptr() as u64, fd: 0, flags: 0 })
            .with_context(|| format!("cannot open {}", path.to_string_lossy()))?;
        let program = program(place, port, stages.as_raw_fd().cast_unsigned());
        // All programs of an array are alike in the frags flag: which way is found out by trying.
        let mut refused = None;
        for flags in [0, BPF_F_XDP_HAS_FRAGS] {
            let program =
                load(&program, (BPF_PROG_TYPE_XDP, BPF_XDP, flags)).context("cannot load the firewall")?;
            let value = program.as_raw_fd().cast_unsigned();
            match change(&stages, BPF_MAP_UPDATE_ELEM, place, Some(value)) {
                Ok(()) => return Ok(Self { stages, place, _program: program }),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.expect("it was tried")).context("cannot chain the firewall")
    }

    /// Takes it out of its place again.
    pub fn stop(self) -> Result<()> {
        change(&self.stages, BPF_MAP_DELETE_ELEM, self.place, None).context("cannot take the firewall out")
    }
}

fn change(stages: &OwnedFd, command: libc::c_long, place: Place, value: Option<u32>) -> std::io::Result<()> {
    #[repr(C)]
    struct Element {
        map: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let key = place as u32;
    let map = stages.as_raw_fd().cast_unsigned();
    let element = Element {
        map,
        pad: 0,
        key: &raw const key as u64,
        value: value.as_ref().map_or(0, |value| &raw const *value as u64),
        flags: 0,
    };
    call(command, &element).map(drop)
}

fn program(place: Place, port: u16, stages: u32) -> Vec<u64> {
    let mut code = vec![
        instruction(MOVE_REGISTER, 0x16, 0, 0),
        // Data, and its end.
        instruction(LOAD_WORD, 0x12, 0, 0),
        instruction(LOAD_WORD, 0x13, 4, 0),
        instruction(MOVE_REGISTER, 0x24, 0, 0),
        instruction(ADD, 0x04, 0, 38),
        instruction(JUMP_IF_ABOVE, 0x34, 6, 0),
        instruction(LOAD_HALF, 0x25, 12, 0),
        instruction(JUMP_IF_NOT, 0x05, 4, u32::from(0x0800_u16.to_be())),
        instruction(LOAD_HALF, 0x25, 36, 0),
        instruction(JUMP_IF_NOT, 0x05, 2, u32::from(port.to_be())),
        instruction(MOVE, 0, 0, DROP),
        instruction(EXIT, 0, 0, 0),
    ];
    if place == Place::Before {
        code.extend([
            instruction(MOVE_REGISTER, 0x61, 0, 0),
            instruction(LOAD_MAP, 0x12, 0, stages),
            0,
            instruction(MOVE, 0x03, 0, OURS),
            instruction(CALL, 0, 0, TAIL_CALL),
        ]);
    }
    code.extend([instruction(MOVE, 0, 0, PASS), instruction(EXIT, 0, 0, 0)]);
    code
}
