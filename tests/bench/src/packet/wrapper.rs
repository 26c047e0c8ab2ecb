//! One program under test inside the rewinding wrapper, and the time of its rounds.

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, ProgramArray},
    programs::{ProgramFd, TestRun, TestRunOptions, Xdp},
};
use nix::time::{ClockId, clock_gettime};

use super::frame::Frame;
use crate::{dataplane::load_xdp, objects};

/// First word of the headers in the wrapper's state, and how many it holds.
const TEMPLATE: usize = 8;
const TEMPLATE_WORDS: usize = 16;

/// XDP verdicts.
pub const DROP: u32 = 1;
/// To the host's stack.
pub const PASS: u32 = 2;
/// Out of the interface that it came in by.
pub const TX: u32 = 3;

/// What a run of many rounds gave.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Processor time per round, wrapper and kernel's loop included, in nanoseconds.
    pub ns: f64,
    /// The last round's verdict.
    pub verdict: u32,
    /// Length of the frame after the last round.
    pub len: usize,
}

/// What changes from round to round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Variety {
    /// Clients, a power of two; 1 for the frame's own.
    pub flows: u32,
    /// VIPs from the frame's own on, a power of two.
    pub vips: u32,
}

/// A wrapper that holds a program under test.
pub struct Wrapper {
    bpf: Ebpf,
    frame: Vec<u8>,
}

impl Wrapper {
    /// Wraps `program`.
    pub fn new(frame: &Frame, variety: Variety, program: &ProgramFd) -> Result<Self> {
        let words = [7usize, 10, 12, 15, 16]
            .into_iter()
            .find(|words| words * 8 >= frame.headers)
            .with_context(|| format!("headers of {} bytes are too long", frame.headers))?;
        ensure!(words * 8 <= frame.bytes.len(), "frame shorter than the bytes that are restored");
        let global = |value: usize| u32::try_from(value).expect("offsets in a frame are small");
        // Source and destination have the same length, and the ports follow them.
        let vip_at = frame.port_at - 4;
        let first_vip = frame.bytes[vip_at..frame.port_at].try_into().expect("4 bytes");
        let first_vip = u32::from_be_bytes(first_vip);
        let mut bpf = EbpfLoader::new()
            .override_global("FRAME_LEN", &global(frame.bytes.len()), true)
            .override_global("WORDS", &global(words), true)
            .override_global("SOURCE_AT", &global(frame.source_at), true)
            .override_global("PORT_AT", &global(frame.port_at), true)
            .override_global("FLOW_MASK", &(variety.flows - 1), true)
            .override_global("VIP_AT", &global(vip_at), true)
            .override_global("FIRST_VIP", &first_vip, true)
            .override_global("VIP_MASK", &(variety.vips - 1), true)
            .load(objects::REWIND)
            .context("load the wrapper")?;
        load_xdp(&mut bpf, "rewind")?;
        let mut state = [0u64; TEMPLATE + TEMPLATE_WORDS];
        for (word, bytes) in state[TEMPLATE..].iter_mut().zip(frame.bytes[..words * 8].chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into().expect("chunks of 8"));
        }
        let mut states: Array<_, [u64; TEMPLATE + TEMPLATE_WORDS]> =
            Array::try_from(bpf.map_mut("STATE").context("map STATE")?)?;
        states.set(0, state, 0)?;
        let mut jump = ProgramArray::try_from(bpf.map_mut("JUMP").context("map JUMP")?)?;
        jump.set(0, program, 0).context("the wrapper cannot call the program under test")?;
        Ok(Self { bpf, frame: frame.bytes.clone() })
    }

    /// Runs `rounds` rounds.
    pub fn run(&self, rounds: u32) -> Result<Run> {
        let program: &Xdp = self.bpf.program("rewind").context("program rewind")?.try_into()?;
        let mut out = [0; 512];
        let options = TestRunOptions {
            data_in: Some(&self.frame),
            data_out: Some(&mut out),
            repeat: rounds,
            ..TestRunOptions::default()
        };
        // The thread's own time: what others took from this CPU meanwhile is not in it.
        let before = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        let result = program.test_run(options)?;
        let took = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)? - before;
        let ns = took.tv_sec() as f64 * 1e9 + took.tv_nsec() as f64;
        Ok(Run {
            ns: ns / f64::from(rounds),
            verdict: result.return_value,
            len: result.data_size_out as usize,
        })
    }
}
