//! XDP program of a worker: maps, and the entry point around `lb_ebpf::worker::decap`.
#![no_std]
#![no_main]
#![allow(missing_docs, reason = "the xdp attribute adds an undocumented function")]

use aya_ebpf::{
    EbpfContext, Global,
    bindings::{bpf_sock_tuple, xdp_action},
    helpers::generated::{bpf_redirect, bpf_sk_release, bpf_skc_lookup_tcp, bpf_tcp_gen_syncookie},
    macros::{map, xdp},
    maps::{Array, HashMap, PerCpuArray, ProgramArray},
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use lb_common::{
    Address, Reason, limits,
    names::stage,
    reply::{ReplyHop, family},
    settings::DecapSettings,
};
use lb_ebpf::{
    Frame, Verdict,
    kernel::global,
    worker::{
        cookie::{self, Cookie, Listeners, Syn, TCP_MAX, is_syn},
        decap::{DecapTables, process},
    },
};

#[unsafe(no_mangle)]
static SETTINGS: Global<DecapSettings> = Global::new(DecapSettings::DEFAULT);

#[map]
static DECAP_ADDRESSES: HashMap<Address, u32> = HashMap::with_max_entries(limits::DECAP_ADDRESSES, 0);
#[map]
static DECAP_VIPS: HashMap<Address, u32> = HashMap::with_max_entries(limits::DECAP_ADDRESSES, 0);
#[map]
static REASONS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Reason::COUNT, 0);
#[map]
static REPLY_HOPS: Array<ReplyHop> = Array::with_max_entries(family::COUNT, 0);
#[map]
static STAGES: ProgramArray = ProgramArray::with_max_entries(stage::COUNT, 0);
#[map]
static ABI: Array<u32> = Array::with_max_entries(1, 0);

lb_ebpf::settings_of!(SETTINGS);

/// The maps of this object.
struct Maps;

impl DecapTables for Maps {
    #[inline(always)]
    fn is_ours(&self, address: &Address) -> bool {
        DECAP_ADDRESSES.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn is_served(&self, vip: &Address) -> bool {
        DECAP_VIPS.get_ptr(vip).is_some()
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        if let Some(counter) = REASONS.get_ptr_mut(reason as u32) {
            // SAFETY: this CPU's own counter, and programs do not preempt each other.
            unsafe { *counter += 1 };
        }
    }
}

/// Decapsulates what arrives on one interface.
#[xdp(frags)]
pub fn decap(ctx: XdpContext) -> u32 {
    let settings = global(&SETTINGS);
    let mut frame = Xdp::new(&ctx);
    let (verdict, reason) = process(&mut frame, &Maps, settings);
    debug!(&ctx, "reason {}", reason as u32);
    if matches!(reason, Reason::DecapIpip | Reason::DecapGue) && is_syn(&frame.packet()) {
        // SAFETY: nothing in this frame needs to be dropped. Without a program there, the stack has the SYN.
        unsafe { STAGES.tail_call(&ctx, stage::COOKIE) };
    }
    match verdict {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Transmit => xdp_action::XDP_TX,
        // SAFETY: no pointers.
        Verdict::Redirect(ifindex) => unsafe { bpf_redirect(ifindex, 0) as u32 },
        _ => xdp_action::XDP_DROP,
    }
}

/// SYNs of clients; see [`stage::COOKIE`].
#[xdp(frags)]
pub fn cookie(ctx: XdpContext) -> u32 {
    match cookie::process(&mut Xdp::new(&ctx), &Sockets(&ctx)) {
        Verdict::Pass => xdp_action::XDP_PASS,
        Verdict::Transmit => xdp_action::XDP_TX,
        // SAFETY: no memory is passed.
        Verdict::Redirect(ifindex) => (unsafe { bpf_redirect(ifindex, 0) }) as u32,
        Verdict::Drop | Verdict::Stage(_) => xdp_action::XDP_DROP,
    }
}

/// The listeners of this network namespace.
struct Sockets<'a>(&'a XdpContext);

impl Listeners for Sockets<'_> {
    #[inline(always)]
    fn cookie(&self, syn: &Syn) -> Option<Cookie> {
        const CURRENT_NETNS: u64 = u64::MAX;
        const LISTEN: u32 = 10;
        // SAFETY: plain integers, for which zero is a value.
        let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
        let size = match &syn.ipv4 {
            Some(ip) => {
                // SAFETY: both members of the union are plain integers, all of them zero.
                let key = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
                (key.saddr, key.daddr) = (ip.source, ip.destination);
                [key.sport, key.dport] = syn.ports;
                12
            }
            None => {
                // SAFETY: as above.
                let key = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
                (key.saddr, key.daddr) = (syn.ipv6.source, syn.ipv6.destination);
                [key.sport, key.dport] = syn.ports;
                36
            }
        };
        // SAFETY: context and tuple are valid, and the size is the tuple's.
        let socket =
            unsafe { bpf_skc_lookup_tcp(self.0.as_ptr().cast(), &raw mut tuple, size, CURRENT_NETNS, 0) };
        if socket.is_null() {
            return None;
        }
        // SAFETY: a socket that the kernel has just given us, until it is released below.
        let answer = if unsafe { (*socket).state } == LISTEN { gen_cookie(socket.cast(), syn) } else { -1 };
        // SAFETY: as above; it is not used after.
        unsafe { bpf_sk_release(socket.cast()) };
        (answer > 0).then_some(Cookie { sequence: answer as u32, mss: (answer >> 32) as u16 })
    }

    #[inline(always)]
    fn reply_hop(&self, is_ipv6: bool) -> Option<ReplyHop> {
        let hop = REPLY_HOPS.get(if is_ipv6 { family::V6 } else { family::V4 })?;
        (hop.ifindex != 0).then_some(*hop)
    }

    #[inline(always)]
    fn count(&self, reason: Reason) {
        Maps.count(reason);
    }
}

/// The listener's cookie for a SYN and its MSS in one number; negative: it would not answer by cookie.
#[inline(always)]
fn gen_cookie(socket: *mut core::ffi::c_void, syn: &Syn) -> i64 {
    // Put together of the least length and what goes beyond it, each with a bound that every verifier follows: 6.1 takes
    // a length that was compared from below for one that may be zero.
    let more = core::hint::black_box(syn.tcp_len.wrapping_sub(20)) & 0x3c;
    if more > TCP_MAX - 20 {
        return -1;
    }
    let len = 20 + more;
    let tcp = syn.tcp.as_ptr().cast_mut().cast();
    match &syn.ipv4 {
        // SAFETY: a listener that we hold, and headers of these sizes; they are only read.
        Some(ip) => unsafe {
            let ip = core::ptr::from_ref(ip).cast_mut().cast();
            bpf_tcp_gen_syncookie(socket, ip, 20, tcp, len as u32)
        },
        // SAFETY: as above.
        None => unsafe {
            let ip = core::ptr::from_ref(&syn.ipv6).cast_mut().cast();
            bpf_tcp_gen_syncookie(socket, ip, 40, tcp, len as u32)
        },
    }
}

lb_ebpf::object!();
