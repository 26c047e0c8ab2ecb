//! Measuring only: a wrapper that makes BPF_PROG_TEST_RUN's repetitions alike, and three programs to
//! compare with.
//!
//! The kernel feeds each repetition the frame as the last one left it. `rewind` puts it back (its
//! start, its headers, and for many flows another client each time) and tail-calls the program under
//! test. `bare` returns XDP_TX at once: what it costs inside the wrapper is the wrapper's own cost.
//! `floor` is the least that an encapsulation can be: one fixed outer header, no decision at all.
//! `plain` is the least that a balancer with tables can be: IPv4 and TCP only, one service lookup, one
//! slot, one backend, two counters, ipip; no features, no exceptions, no IPv6.
//! In: globals and `STATE`, written by the bench. Never part of `lbd`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(missing_docs, reason = "the xdp attribute adds an undocumented function")]

use aya_ebpf::{
    Global,
    bindings::xdp_action,
    macros::{map, xdp},
    maps::{Array, HashMap, PerCpuArray, ProgramArray},
    programs::XdpContext,
};
use core::arch::asm;
use lb_common::{Be16, ServiceKey, mapped, service::TCP, settings::kernel};
use lb_ebpf::{
    Frame, Packet,
    kernel::{Settings, XdpFrame},
    packet::Bytes,
    packet::{
        csum,
        wire::{Ipv4, Tcp},
    },
};

/// This object is loaded on the developer's kernel only.
struct All;

impl Settings for All {
    #[inline(always)]
    fn kernel() -> u32 {
        kernel::ALL
    }
}

/// Length of the frame as the program under test should see it.
#[unsafe(no_mangle)]
static FRAME_LEN: Global<u32> = Global::new(64);
/// Words of 8 bytes to restore from its start: 7, 10, 12, 15 or 16.
#[unsafe(no_mangle)]
static WORDS: Global<u32> = Global::new(7);
/// Where the low 32 bits of the client's address lie.
#[unsafe(no_mangle)]
static SOURCE_AT: Global<u32> = Global::new(26);
/// Where the client's port lies.
#[unsafe(no_mangle)]
static PORT_AT: Global<u32> = Global::new(34);
/// Number of flows less one, a power of two less one; 0 leaves the client alone.
#[unsafe(no_mangle)]
static FLOW_MASK: Global<u32> = Global::new(0);
/// Where the low 32 bits of the VIP lie.
#[unsafe(no_mangle)]
static VIP_AT: Global<u32> = Global::new(30);
/// The low 32 bits of the first VIP, in host order.
#[unsafe(no_mangle)]
static FIRST_VIP: Global<u32> = Global::new(0);
/// Number of VIPs, that follow one another, less one; a power of two less one. 0 leaves the VIP alone.
#[unsafe(no_mangle)]
static VIP_MASK: Global<u32> = Global::new(0);

/// First word of the frame's headers in [`State`].
const TEMPLATE: usize = 8;
/// Flows that share a client's address.
const PORTS_BITS: u32 = 4;

/// Words 0 and 1: rounds so far. From [`TEMPLATE`] on: the frame's headers.
type State = [u64; TEMPLATE + 16];

#[map]
static STATE: Array<State> = Array::with_max_entries(1, 0);
#[map]
static JUMP: ProgramArray = ProgramArray::with_max_entries(1, 0);

/// Eight bytes of a frame.
#[derive(Clone, Copy)]
struct Word(#[allow(dead_code, reason = "written to the frame")] u64);
// SAFETY: one integer.
unsafe impl Bytes for Word {}

/// Restores the frame, then runs the program under test.
#[xdp(frags)]
pub fn rewind(ctx: XdpContext) -> u32 {
    match restore(&mut XdpFrame::<All>::new(&ctx)) {
        // SAFETY: nothing in this frame needs to be dropped.
        Some(()) => unsafe { JUMP.tail_call(&ctx, 0) },
        None => return xdp_action::XDP_ABORTED,
    }
    // No program in the map.
    xdp_action::XDP_ABORTED
}

#[inline(always)]
fn restore(frame: &mut XdpFrame<'_, All>) -> Option<()> {
    let state = STATE.get_ptr_mut(0)?;
    // Waits until the program under test has done all that it began. Without this, one that takes less than the
    // restoring below would be done in its shade, and seem to cost next to nothing.
    // SAFETY: as at the end.
    unsafe { asm!("lock *(u64 *)({0} + 8) += {1}", in(reg) state, in(reg) 1u64) };
    // Called even when nothing moved, so that the wrapper costs the same around every program.
    let grown = frame.packet().len() as i32 - FRAME_LEN.load() as i32;
    if !frame.adjust_head(grown) {
        return None;
    }
    let mut packet = frame.packet();
    // SAFETY: the map's only entry; nobody else writes it during a run.
    let words = unsafe { &*state };
    let written = match WORDS.load() {
        7 => write::<7>(&mut packet, words),
        10 => write::<10>(&mut packet, words),
        12 => write::<12>(&mut packet, words),
        15 => write::<15>(&mut packet, words),
        _ => write::<16>(&mut packet, words),
    };
    if !written {
        return None;
    }
    let mask = FLOW_MASK.load();
    if mask != 0 {
        let flow = words[0] as u32 & mask;
        let address = (0x0a00_0000 | flow >> PORTS_BITS).to_be();
        let port = (0x8000 | flow as u16 & ((1 << PORTS_BITS) - 1)).to_be();
        if !packet.write(SOURCE_AT.load() as usize, address) || !packet.write(PORT_AT.load() as usize, port) {
            return None;
        }
    }
    let mask = VIP_MASK.load();
    if mask != 0 {
        // Round by round another, in no order: 2^32 over the golden ratio.
        let number = (words[0] as u32).wrapping_mul(0x9e37_79b9) >> 8 & mask;
        if !packet.write(VIP_AT.load() as usize, (FIRST_VIP.load() + number).to_be()) {
            return None;
        }
    }
    // Counts the round, and being a locked instruction waits until the stores above have reached the
    // cache: otherwise the program under test would pay for reading what is still on its way.
    // SAFETY: as above; the entry is aligned to 8 bytes. (The compiler offers no atomics for BPF.)
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) state, in(reg) 1u64) };
    Some(())
}

#[inline(always)]
fn write<const N: usize>(packet: &mut Packet, state: &State) -> bool {
    for i in 0..N {
        if !packet.write(i * 8, Word(state[TEMPLATE + i])) {
            return false;
        }
    }
    true
}

/// Does nothing.
#[xdp(frags)]
pub fn bare(_ctx: XdpContext) -> u32 {
    xdp_action::XDP_TX
}

/// Puts a fixed Ethernet and IPv4 header in front of the frame's IP packet; only length and checksum
/// are computed.
#[xdp(frags)]
pub fn floor(ctx: XdpContext) -> u32 {
    if encapsulate(&mut XdpFrame::<All>::new(&ctx)) { xdp_action::XDP_TX } else { xdp_action::XDP_ABORTED }
}

const SOURCE: u32 = 0x0a00_0001;

#[inline(always)]
fn encapsulate(frame: &mut XdpFrame<'_, All>) -> bool {
    let inner_len = frame.packet().len() - 14;
    push(frame, inner_len as u16, 0, 0x0a00_0002)
}

/// Puts an Ethernet and an IPv4 header in front of the IP packet.
#[inline(always)]
fn push(frame: &mut XdpFrame<'_, All>, inner_len: u16, tos: u8, destination: u32) -> bool {
    let total_len = inner_len + 20;
    if !frame.adjust_head(-20) {
        return false;
    }
    let mut packet = frame.packet();
    let sum = 0x4500 + 0x4000 + 0x4004 + SOURCE as u64 + destination as u64 + total_len as u64 + tos as u64;
    let ip = Ipv4 {
        version_len: 0x45,
        tos,
        total_len: total_len.to_be(),
        id: 0,
        fragment: 0x4000_u16.to_be(),
        ttl: 64,
        protocol: 4,
        check: csum::finish(sum).to_be(),
        source: SOURCE.to_be(),
        destination: destination.to_be(),
    };
    packet.write(0, 0x0200_0002_u32)
        && packet.write(4, 0x0002_u16)
        && packet.write(6, 0x0200_0001_u32)
        && packet.write(10, 0x0002_u16)
        && packet.write(12, 0x0800_u16.to_be())
        && packet.write(14, ip)
}

/// Slots and backends of `plain`.
const PLAIN_SLOTS: u32 = 65_537;
const PLAIN_BACKENDS: u32 = 1_000;

#[map]
static SERVICES: HashMap<ServiceKey, u32> = HashMap::with_max_entries(64, 0);
#[map]
static SLOTS: Array<u32> = Array::with_max_entries(PLAIN_SLOTS, 0);
/// Outer destinations in host order.
#[map]
static BACKENDS: Array<u32> = Array::with_max_entries(PLAIN_BACKENDS, 0);
/// Packets and bytes by service, and by backend.
#[map]
static SERVICE_STATS: PerCpuArray<[u64; 2]> = PerCpuArray::with_max_entries(64, 0);
#[map]
static BACKEND_STATS: PerCpuArray<[u64; 2]> = PerCpuArray::with_max_entries(PLAIN_BACKENDS, 0);

/// Balances IPv4 TCP without options over its tables.
#[xdp(frags)]
pub fn plain(ctx: XdpContext) -> u32 {
    match balance(&mut XdpFrame::<All>::new(&ctx)) {
        Some(true) => xdp_action::XDP_TX,
        Some(false) => xdp_action::XDP_ABORTED,
        None => xdp_action::XDP_PASS,
    }
}

#[inline(always)]
fn balance(frame: &mut XdpFrame<'_, All>) -> Option<bool> {
    let packet = frame.packet();
    let kind: u16 = packet.read(12)?;
    if kind != 0x0800_u16.to_be() {
        return None;
    }
    let ip: Ipv4 = packet.read(14)?;
    if ip.version_len != 0x45 || ip.protocol != TCP || ip.fragment & 0x3fff_u16.to_be() != 0 {
        return None;
    }
    let tcp: Tcp = packet.read(34)?;
    let key = ServiceKey {
        vip: mapped(ip.destination.to_ne_bytes()),
        port: Be16::from_bytes(tcp.port.to_ne_bytes()),
        protocol: TCP,
        pad: 0,
    };
    // SAFETY: one aligned word, which nobody changes during a run.
    let service = unsafe { SERVICES.get(&key).copied()? };
    let mut hash = (ip.source as u64) << 32 | ip.destination as u64;
    for word in [0x1234_5678_9abc_def0, (tcp.source_port as u64) << 16 | tcp.port as u64] {
        hash = (hash ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        hash ^= hash >> 33;
    }
    let slot = ((hash >> 32) * PLAIN_SLOTS as u64) >> 32;
    let backend = *SLOTS.get(slot as u32)?;
    let destination = *BACKENDS.get(backend)?;
    let len = u16::from_be(ip.total_len);
    if !push(frame, len, ip.tos, destination) {
        return Some(false);
    }
    for stats in [SERVICE_STATS.get_ptr_mut(service)?, BACKEND_STATS.get_ptr_mut(backend)?] {
        // SAFETY: this CPU's own counters, and programs do not preempt each other.
        unsafe {
            (*stats)[0] += 1;
            (*stats)[1] += len as u64;
        }
    }
    Some(true)
}

lb_ebpf::object!();
