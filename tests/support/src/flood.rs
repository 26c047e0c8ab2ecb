//! A flood of forged packets, as fast as one processor makes them: frames that the kernel hands to an XDP
//! program of ours (`BPF_PROG_TEST_RUN` with live frames), which gives each another client and sends it out.
//! Bounded: so many per second, for so long.

use std::{
    net::Ipv4Addr,
    os::fd::AsRawFd,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    netns::Namespace,
    program::{BPF_F_XDP_HAS_FRAGS, BPF_PROG_TYPE_XDP, BPF_XDP, call, instruction, load},
};

const BPF_PROG_TEST_RUN: libc::c_long = 10;
const LIVE_FRAMES: u32 = 1 << 1;
/// A call sets up pages and takes them down again, so frames are sent in bursts.
const BURSTS_PER_S: u32 = 20;

/// Clients of the flood: 10.200.0.0/16, which leads nowhere.
pub const SOURCES: &str = "10.200.0.0/16";

/// What a flood is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// SYNs.
    Syn,
    /// Packets of TCP connections that there are not.
    Ack,
    /// UDP datagrams.
    Udp,
}

/// What to send.
#[derive(Clone, Copy, Debug)]
pub struct Flood {
    /// Packets of which kind.
    pub kind: Kind,
    /// The VIP.
    pub vip: Ipv4Addr,
    /// Its port.
    pub port: u16,
    /// Packets per second.
    pub rate: u32,
    /// For how long.
    pub time: Duration,
    /// MACs of the next hop, and of the interface.
    pub macs: [[u8; 6]; 2],
}

/// What was sent.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// Packets.
    pub count: u64,
    /// Time from the first to the last.
    pub time: Duration,
}

impl Sent {
    /// Packets per second.
    pub fn rate(&self) -> f64 {
        self.count as f64 / self.time.as_secs_f64()
    }
}

impl Flood {
    /// Sends it all out of `interface` of a namespace.
    pub fn run(self, namespace: &Namespace, interface: &str) -> Result<Sent> {
        let ifindex = namespace.index(interface)?;
        namespace.enter(move || self.send(ifindex))?
    }

    fn send(self, ifindex: u32) -> Result<Sent> {
        let frame = self.frame();
        let program = load(&program(&frame, self.kind), (BPF_PROG_TYPE_XDP, BPF_XDP, BPF_F_XDP_HAS_FRAGS))
            .context("cannot load the flood's program")?;
        let burst = self.rate / BURSTS_PER_S;
        let (started, mut count, mut bursts) = (Instant::now(), 0, 0);
        while started.elapsed() < self.time {
            let context = XdpMd { data_end: frame.len() as u32, ifindex, ..XdpMd::default() };
            let run = TestRun {
                program: program.as_raw_fd().cast_unsigned(),
                frame_len: frame.len() as u32,
                frame: frame.as_ptr() as u64,
                repeat: burst,
                context_len: size_of::<XdpMd>() as u32,
                context: &raw const context as u64,
                flags: LIVE_FRAMES,
                ..TestRun::default()
            };
            call(BPF_PROG_TEST_RUN, &run)
                .context("the kernel does not send live frames (Linux 5.18 does)")?;
            (count, bursts) = (count + u64::from(burst), bursts + 1);
            let due = Duration::from_secs(1) * bursts / BURSTS_PER_S;
            std::thread::sleep(due.saturating_sub(started.elapsed()));
        }
        ensure!(count > 0, "nothing was sent");
        Ok(Sent { count, time: started.elapsed() })
    }

    /// A SYN with the usual options, or another packet of the same length; what the program changes cancels out in both
    /// checksums, or there is none.
    fn frame(&self) -> Vec<u8> {
        let mut frame = self.macs.concat();
        frame.extend([8, 0]);
        let (protocol, tcp_flags) = match self.kind {
            Kind::Syn => (6, 2),
            Kind::Ack => (6, 0x10),
            Kind::Udp => (17, 0),
        };
        let mut ip = vec![0x45, 0, 0, 44, 0xff, 0xff, 0x40, 0, 64, protocol, 0, 0, 10, 200, 0, 0];
        ip.extend(self.vip.octets());
        let check = checksum(&ip);
        ip[10..12].copy_from_slice(&check);
        frame.extend(&ip);
        if self.kind == Kind::Udp {
            frame.extend([0, 0]);
            frame.extend(self.port.to_be_bytes());
            frame.extend([0, 24, 0, 0]);
            frame.resize(14 + 44, 0);
            return frame;
        }
        let mut tcp = vec![0, 0];
        tcp.extend(self.port.to_be_bytes());
        tcp.extend([
            0x12, 0x34, 0xff, 0xff, 0, 0, 0, 0, 0x60, tcp_flags, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 0x05, 0xb4,
        ]);
        let pseudo = [&ip[12..20], &[0, 6, 0, 24], &tcp].concat();
        let check = checksum(&pseudo);
        tcp[16..18].copy_from_slice(&check);
        frame.extend(tcp);
        frame
    }
}

fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// `struct xdp_md`.
#[repr(C)]
#[derive(Default)]
struct XdpMd {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ifindex: u32,
    queue: u32,
    egress: u32,
}

/// The part of `union bpf_attr` for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    program: u32,
    result: u32,
    frame_len: u32,
    out_len: u32,
    frame: u64,
    out: u64,
    repeat: u32,
    duration: u32,
    context_len: u32,
    context_out_len: u32,
    context: u64,
    context_out: u64,
    flags: u32,
    cpu: u32,
    batch: u32,
    pad: u32,
}

const MOVE_REGISTER: u8 = 0xbf;
const MOVE: u8 = 0xb7;
const ADD: u8 = 0x07;
const XOR: u8 = 0xa7;
const SHIFT_RIGHT: u8 = 0x77;
const LOAD_WORD: u8 = 0x61;
const STORE_HALF: u8 = 0x6b;
const STORE_HALF_NOW: u8 = 0x6a;
const JUMP_IF_NOT_ABOVE: u8 = 0xbd;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const RANDOM: u32 = 7;
const DROP: u32 = 1;
const TRANSMIT: u32 = 3;

/// Writes the frame anew (the kernel hands out frames as their last readers left them), and in it a random half of
/// the address, whose complement goes into the IP id and the TCP window, and a random port, whose complement
/// goes into the sequence number.
fn program(frame: &[u8], kind: Kind) -> Vec<u64> {
    let mut code = vec![
        instruction(MOVE_REGISTER, 0x16, 0, 0),
        instruction(CALL, 0, 0, RANDOM),
        instruction(LOAD_WORD, 0x62, 0, 0),
        instruction(LOAD_WORD, 0x63, 4, 0),
        instruction(MOVE_REGISTER, 0x24, 0, 0),
        instruction(ADD, 0x04, 0, frame.len() as u32),
        // Never: all frames are as long as this one.
        instruction(JUMP_IF_NOT_ABOVE, 0x34, 2, 0),
        instruction(MOVE, 0x00, 0, DROP),
        instruction(EXIT, 0, 0, 0),
    ];
    let half = |at: usize| u32::from(u16::from_ne_bytes([frame[at], frame[at + 1]]));
    code.extend((0..frame.len()).step_by(2).map(|at| instruction(STORE_HALF_NOW, 0x02, at as u16, half(at))));
    code.extend([
        instruction(STORE_HALF, 0x02, 28, 0),
        instruction(MOVE_REGISTER, 0x05, 0, 0),
        instruction(XOR, 0x05, 0, 0xffff),
        instruction(STORE_HALF, 0x52, 18, 0),
    ]);
    if kind != Kind::Udp {
        code.push(instruction(STORE_HALF, 0x52, 48, 0));
    }
    code.extend([instruction(SHIFT_RIGHT, 0x00, 0, 16), instruction(STORE_HALF, 0x02, 34, 0)]);
    if kind != Kind::Udp {
        code.extend([instruction(XOR, 0x00, 0, 0xffff), instruction(STORE_HALF, 0x02, 40, 0)]);
    }
    code.extend([instruction(MOVE, 0x00, 0, TRANSMIT), instruction(EXIT, 0, 0, 0)]);
    code
}
