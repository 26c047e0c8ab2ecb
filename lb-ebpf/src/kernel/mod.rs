//! The kernel's side of the traits: BPF maps, helpers, the XDP buffer. Used by `src/bin` only.

use crate::{
    Frame, Packet, Verdict,
    packet::{
        SUM_CHUNK, SUM_CHUNKS, Sum,
        fib::{Fib, FibAnswer, FibQuery, Hop},
    },
    second_chance::worker::{SocketQuery, Sockets},
};
use aya_ebpf::{
    EbpfContext, Global,
    bindings::{
        self, bpf_fib_lookup as FibLookup, bpf_sock, bpf_sock_tuple,
        bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2, xdp_action,
    },
    helpers,
    macros::map,
    maps::{DevMapHash, PerCpuArray},
    programs::XdpContext,
};
use core::marker::PhantomData;
use lb_common::{Reason, service::UDP, settings::kernel};

/// A program's settings, as far as this module needs them.
pub trait Settings {
    /// Bits of [`kernel`], read where they are asked for: the verifier knows read-only globals, while kernels before 5.16
    /// forget constants that lay on the stack.
    fn kernel() -> u32;
}

/// A global by a pointer that LLVM knows nothing of, so that it takes no initial value for the one that the loader sets.
/// (`Global::load` copies it to the stack, where the verifier's older versions lose it and there is no room.)
#[inline(always)]
pub fn global<T>(global: &'static Global<T>) -> &'static T {
    // SAFETY: `Global` is a transparent wrapper of an initialised T, which is never written once the program is loaded.
    unsafe { &*core::hint::black_box(core::ptr::from_ref(global)).cast::<T>() }
}

/// An XDP buffer.
pub struct XdpFrame<'a, S> {
    ctx: &'a XdpContext,
    settings: PhantomData<S>,
}

impl<'a, S: Settings> XdpFrame<'a, S> {
    /// The frame of this run of a program with these settings.
    #[inline(always)]
    pub fn new(ctx: &'a XdpContext) -> Self {
        Self { ctx, settings: PhantomData }
    }

    /// Whether the kernel can do this. The verifier knows the answer, and removes what is not taken.
    #[inline(always)]
    fn can(&self, bit: u32) -> bool {
        S::kernel() & bit != 0
    }
}

impl<S: Settings> Frame for XdpFrame<'_, S> {
    #[inline(always)]
    fn packet(&self) -> Packet {
        // SAFETY: the kernel gives the bounds of the buffer, which this run owns; the verifier
        // refuses a window that is used after an end has moved.
        unsafe { Packet::new(self.ctx.data(), self.ctx.data_end()) }
    }

    #[inline(always)]
    fn total_len(&self) -> usize {
        if !self.can(kernel::FRAGS) {
            return self.packet().len();
        }
        // SAFETY: the context is valid during the run.
        unsafe { helpers::generated::bpf_xdp_get_buff_len(self.ctx.ctx) as usize }
    }

    #[inline(always)]
    fn adjust_head(&mut self, delta: i32) -> bool {
        // SAFETY: the context is valid during the run.
        unsafe { helpers::generated::bpf_xdp_adjust_head(self.ctx.ctx, delta) == 0 }
    }

    #[inline(always)]
    fn adjust_tail(&mut self, delta: i32) -> bool {
        // SAFETY: the context is valid during the run.
        delta == 0 || unsafe { helpers::generated::bpf_xdp_adjust_tail(self.ctx.ctx, delta) == 0 }
    }

    #[inline(always)]
    fn sum<const N: usize>(&self, offset: usize) -> Option<u32> {
        let from = self.packet().pointer::<N>(offset)?;
        // SAFETY: `pointer` checked the N bytes; the helper only reads them.
        let sum =
            unsafe { helpers::generated::bpf_csum_diff(core::ptr::null_mut(), 0, from.cast(), N as u32, 0) };
        if sum < 0 { None } else { Some(sum as u32) }
    }

    #[inline(always)]
    fn sum_of(&self, offset: usize, len: usize, memory: &mut Sum) -> Option<u32> {
        if self.can(kernel::FRAGS) {
            self.sum_of_parts(offset, len, memory)
        } else {
            self.sum_of_linear(offset, len, memory)
        }
    }

    #[inline(always)]
    fn ifindex(&self) -> u32 {
        self.ctx.ingress_ifindex() as u32
    }

    #[inline(always)]
    fn context(&self) -> *mut core::ffi::c_void {
        self.ctx.as_ptr()
    }
}

impl<S: Settings> XdpFrame<'_, S> {
    /// [`Frame::sum_of`] of a packet that may have fragments.
    #[inline(always)]
    fn sum_of_parts(&self, offset: usize, len: usize, memory: *mut Sum) -> Option<u32> {
        // SAFETY: a place in memory that this run owns; nothing is read.
        let bytes = unsafe { (&raw mut (*memory).bytes).cast::<u8>() };
        let load = |offset: u32, len: u32| {
            // SAFETY: the context is valid during the run, and callers see to it that the piece fits.
            unsafe { helpers::generated::bpf_xdp_load_bytes(self.ctx.ctx, offset, bytes.cast(), len) == 0 }
        };
        let add = |sum: u32, len: u32| {
            // SAFETY: as above; the helper only reads.
            unsafe { helpers::generated::bpf_csum_diff(core::ptr::null_mut(), 0, bytes.cast(), len, sum) }
        };
        // SAFETY: each access is to a field of memory that this run owns. They are volatile because what has been
        // stored is unknown to the verifier: rounds that differ in nothing it knows are walked once.
        unsafe {
            (&raw mut (*memory).left).write_volatile(len as u32);
            (&raw mut (*memory).offset).write_volatile(offset as u32);
            (&raw mut (*memory).sum).write_volatile(0);
            for _ in 0..SUM_CHUNKS {
                let left = (&raw const (*memory).left).read_volatile();
                if left < SUM_CHUNK as u32 {
                    break;
                }
                let offset = (&raw const (*memory).offset).read_volatile();
                if !load(offset, SUM_CHUNK as u32) {
                    return None;
                }
                let sum = add((&raw const (*memory).sum).read_volatile(), SUM_CHUNK as u32);
                (&raw mut (*memory).sum).write_volatile(sum as u32);
                (&raw mut (*memory).offset).write_volatile(offset + SUM_CHUNK as u32);
                (&raw mut (*memory).left).write_volatile(left - SUM_CHUNK as u32);
            }
            let left = (&raw const (*memory).left).read_volatile();
            let sum = (&raw const (*memory).sum).read_volatile();
            if left >= SUM_CHUNK as u32 {
                return None;
            }
            if left == 0 {
                return Some(sum);
            }
            // Put together of one and a masked rest: to 6.1, what is not zero may still be.
            let left = 1 + (core::hint::black_box(left - 1) & (SUM_CHUNK as u32 - 1));
            // The bytes behind the last are zeros to the sum.
            bytes.add((left & !3) as usize).cast::<u32>().write_unaligned(0);
            if !load((&raw const (*memory).offset).read_volatile(), left) {
                return None;
            }
            Some(add(sum, (left + 3) & !3) as u32)
        }
    }

    /// [`Frame::sum_of`] of a packet that has no fragments, by helpers of 5.10.
    #[inline(always)]
    fn sum_of_linear(&self, offset: usize, len: usize, memory: *mut Sum) -> Option<u32> {
        // SAFETY: each access is to a field of memory that this run owns. Volatile for the reason in `sum_of_parts`.
        unsafe {
            (&raw mut (*memory).left).write_volatile(len as u32);
            (&raw mut (*memory).offset).write_volatile(offset as u32);
            (&raw mut (*memory).sum).write_volatile(0);
            for _ in 0..SUM_CHUNKS {
                if (&raw const (*memory).left).read_volatile() < SUM_CHUNK as u32 {
                    break;
                }
                self.sum_piece::<SUM_CHUNK>(memory)?;
            }
            if (&raw const (*memory).left).read_volatile() >= SUM_CHUNK as u32 {
                return None;
            }
        }
        self.sum_bit::<256>(memory)?;
        self.sum_bit::<128>(memory)?;
        self.sum_bit::<64>(memory)?;
        self.sum_bit::<32>(memory)?;
        self.sum_bit::<16>(memory)?;
        self.sum_bit::<8>(memory)?;
        self.sum_bit::<4>(memory)?;
        // SAFETY: as above.
        let (left, offset, sum) = unsafe {
            (
                (&raw const (*memory).left).read_volatile() & 3,
                (&raw const (*memory).offset).read_volatile() as usize & SUM_REACH,
                (&raw const (*memory).sum).read_volatile(),
            )
        };
        if left == 0 {
            return Some(sum);
        }
        // The last word of the packet ends with them, as headers come before. Zeros take the place of what follows.
        let place = self.linear::<4>((offset + left as usize).wrapping_sub(4) & SUM_REACH)?;
        // SAFETY: `linear` checked the four bytes; unaligned packet access is one load on kernels that offer XDP.
        let word = u32::from_le(unsafe { place.cast::<u32>().read() }) >> (8 * (4 - left));
        // SAFETY: memory that this run owns, and a helper that reads four bytes of it.
        let sum = unsafe {
            let bytes = (&raw mut (*memory).bytes).cast::<u32>();
            bytes.write_unaligned(word.to_le());
            helpers::generated::bpf_csum_diff(core::ptr::null_mut(), 0, bytes, 4, sum)
        };
        Some(sum as u32)
    }

    /// Adds the next `N` bytes, if that bit of what is left is set.
    #[inline(always)]
    fn sum_bit<const N: usize>(&self, memory: *mut Sum) -> Option<()> {
        // SAFETY: a field of memory that this run owns.
        if unsafe { (&raw const (*memory).left).read_volatile() } & N as u32 == 0 {
            return Some(());
        }
        self.sum_piece::<N>(memory)
    }

    /// Adds the next `N` bytes.
    #[inline(always)]
    fn sum_piece<const N: usize>(&self, memory: *mut Sum) -> Option<()> {
        // SAFETY: fields of memory that this run owns; `linear` checked the bytes that the helper reads.
        unsafe {
            let offset = (&raw const (*memory).offset).read_volatile();
            let place = self.linear::<N>(offset as usize & SUM_REACH)?;
            let sum = (&raw const (*memory).sum).read_volatile();
            let sum =
                helpers::generated::bpf_csum_diff(core::ptr::null_mut(), 0, place.cast(), N as u32, sum);
            (&raw mut (*memory).sum).write_volatile(sum as u32);
            (&raw mut (*memory).offset).write_volatile(offset + N as u32);
            let left = (&raw const (*memory).left).read_volatile();
            (&raw mut (*memory).left).write_volatile(left - N as u32);
        }
        Some(())
    }

    /// `N` bytes at an offset that may be far behind the headers, up to [`SUM_REACH`].
    #[inline(always)]
    fn linear<const N: usize>(&self, offset: usize) -> Option<*mut u8> {
        let place = self.ctx.data() + offset;
        if place + N > self.ctx.data_end() { None } else { Some(place as *mut u8) }
    }
}

/// Farthest place that a sum reaches, as a mask: what the verifier wants to see of a variable offset.
const SUM_REACH: usize = 0x7fff;

impl<S: Settings> Fib for XdpFrame<'_, S> {
    #[inline(always)]
    fn narrower(&self, ifindex: u32, len: u32) -> Option<u32> {
        if !self.can(kernel::CHECK_MTU) {
            return None;
        }
        let mut mtu = len;
        // SAFETY: the context is valid during the run, and the helper reads and writes one word.
        let answer = unsafe { helpers::generated::bpf_check_mtu(self.ctx.as_ptr(), ifindex, &mut mtu, 0, 0) };
        // An interface that is gone is found out by whoever sends there.
        (answer == i64::from(bindings::bpf_check_mtu_ret::BPF_MTU_CHK_RET_FRAG_NEEDED)).then_some(mtu)
    }

    /// `bpf_fib_lookup`, never inlined: it is the slow path, and callers have no stack to spare.
    #[inline(never)]
    fn lookup(&self, query: &FibQuery) -> Result<FibAnswer, (Reason, u32)> {
        const AF_INET: u8 = 2;
        const AF_INET6: u8 = 10;
        let Some(params) = FIB.get_ptr_mut(0) else { return Err((Reason::BrokenTable, 0)) };
        // SAFETY: this CPU's own, and programs do not preempt each other; plain integers, for which zero is a value.
        let params = unsafe {
            params.write_bytes(0, 1);
            &mut *params
        };
        params.family = if query.is_ipv6 { AF_INET6 } else { AF_INET };
        params.l4_protocol = query.protocol;
        params.__bindgen_anon_1.tot_len = query.len as u16;
        params.ifindex = self.ifindex();
        if query.is_ipv6 {
            params.__bindgen_anon_3.ipv6_src = query.source;
            params.__bindgen_anon_4.ipv6_dst = query.destination;
        } else {
            params.__bindgen_anon_2.tos = query.tos;
            params.__bindgen_anon_3.ipv4_src = query.source[3];
            params.__bindgen_anon_4.ipv4_dst = query.destination[3];
        }
        let chooses = query.source[3] == 0 && query.source[0] == 0;
        // A kernel that does not know the flag refuses the lookup; without it, no source is chosen.
        let flags = if chooses && self.can(kernel::FIB_SRC) { bindings::BPF_FIB_LOOKUP_SRC } else { 0 };
        // SAFETY: context and parameters are valid, and the size is theirs.
        let answer = unsafe {
            helpers::generated::bpf_fib_lookup(
                self.ctx.as_ptr(),
                params,
                size_of::<FibLookup>() as i32,
                flags,
            )
        };
        match answer as u32 {
            bindings::BPF_FIB_LKUP_RET_SUCCESS => {}
            bindings::BPF_FIB_LKUP_RET_NO_NEIGH => return Err((Reason::NoNeighbour, 0)),
            bindings::BPF_FIB_LKUP_RET_FRAG_NEEDED => {
                // SAFETY: the helper has written the MTU here.
                return Err((Reason::TooBigAnswered, unsafe { params.__bindgen_anon_1.mtu_result } as u32));
            }
            _ => return Err((Reason::NoRoute, 0)),
        }
        // SAFETY: plain integers; the helper puts a router's address in the destination's place.
        let is_routed = unsafe {
            if query.is_ipv6 {
                params.__bindgen_anon_4.ipv6_dst != query.destination
            } else {
                params.family != AF_INET || params.__bindgen_anon_4.ipv4_dst != query.destination[3]
            }
        };
        if query.on_link && is_routed {
            return Err((Reason::NotOnLink, 0));
        }
        let mac =
            |m: &[u8; 6]| (u32::from_ne_bytes([m[0], m[1], m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]]));
        let hop = Hop {
            next_hop: mac(&params.dmac),
            egress_mac: mac(&params.smac),
            vlan: 0,
            ifindex: params.ifindex,
            mtu: 0,
        };
        // SAFETY: both members of each union are plain integers.
        let source = unsafe {
            if !chooses {
                query.source
            } else if query.is_ipv6 {
                params.__bindgen_anon_3.ipv6_src
            } else {
                crate::packet::parse::mapped(params.__bindgen_anon_3.ipv4_src)
            }
        };
        Ok(FibAnswer { hop, source })
    }
}

/// Parameters of `bpf_fib_lookup`, which the stack has no room for.
#[map]
static FIB: PerCpuArray<FibLookup> = PerCpuArray::with_max_entries(1, 0);

impl<S: Settings> Sockets for XdpFrame<'_, S> {
    #[inline(always)]
    fn has_flow(&self, query: &SocketQuery) -> bool {
        // SAFETY: plain integers, for which zero is a value.
        let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
        let size = if query.is_ipv6 {
            tuple.__bindgen_anon_1.ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
                saddr: query.source,
                daddr: query.destination,
                sport: query.source_port,
                dport: query.port,
            };
            size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>()
        } else {
            tuple.__bindgen_anon_1.ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
                saddr: query.source[3],
                daddr: query.destination[3],
                sport: query.source_port,
                dport: query.port,
            };
            size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>()
        } as u32;
        if query.protocol == UDP {
            self.has_udp(&mut tuple, size)
        } else {
            self.has_tcp(&mut tuple, size, query)
        }
    }
}

/// This network namespace (`BPF_F_CURRENT_NETNS`).
const THIS_NAMESPACE: u64 = u64::MAX;
/// Socket states, as the kernel numbers them.
const ESTABLISHED: u32 = 1;
const LISTEN: u32 = 10;

impl<S: Settings> XdpFrame<'_, S> {
    #[inline(always)]
    fn has_udp(&self, tuple: &mut bpf_sock_tuple, size: u32) -> bool {
        // SAFETY: context and tuple are valid, and the size is the tuple's.
        let socket = unsafe {
            helpers::generated::bpf_sk_lookup_udp(self.ctx.ctx.cast(), tuple, size, THIS_NAMESPACE, 0)
        };
        if socket.is_null() {
            return false;
        }
        // SAFETY: not null, and held until it is released.
        let state = unsafe { (*socket).state };
        // SAFETY: the lookup gave it, and nobody uses it afterwards.
        unsafe { helpers::generated::bpf_sk_release(socket.cast()) };
        // A datagram socket is in this state once it is connected.
        state == ESTABLISHED
    }

    #[inline(always)]
    fn has_tcp(&self, tuple: &mut bpf_sock_tuple, size: u32, query: &SocketQuery) -> bool {
        // SAFETY: as in `has_udp`.
        let socket = unsafe {
            helpers::generated::bpf_skc_lookup_tcp(self.ctx.ctx.cast(), tuple, size, THIS_NAMESPACE, 0)
        };
        if socket.is_null() {
            return false;
        }
        // SAFETY: as in `has_udp`.
        let state = unsafe { (*socket).state };
        let has = state != LISTEN || self.is_cookie(socket, query);
        // SAFETY: as in `has_udp`.
        unsafe { helpers::generated::bpf_sk_release(socket.cast()) };
        has
    }

    /// Whether the packet shows a listener a SYN cookie that it has given out lately.
    #[inline(always)]
    fn is_cookie(&self, listener: *mut bpf_sock, query: &SocketQuery) -> bool {
        let packet = self.packet();
        let Some(tcp) = packet.pointer::<20>(query.l4) else { return false };
        // The barrier keeps LLVM from deriving one bounds check from the other, which the verifier does not follow.
        let ip = core::hint::black_box(query.ip);
        if query.is_ipv6 {
            let Some(ip) = packet.pointer::<40>(ip) else { return false };
            // SAFETY: the listener is held, and both headers lie in the packet.
            0 == unsafe {
                helpers::generated::bpf_tcp_check_syncookie(listener.cast(), ip.cast(), 40, tcp.cast(), 20)
            }
        } else {
            let Some(ip) = packet.pointer::<20>(ip) else { return false };
            // SAFETY: as above.
            0 == unsafe {
                helpers::generated::bpf_tcp_check_syncookie(listener.cast(), ip.cast(), 20, tcp.cast(), 20)
            }
        }
    }
}

/// The XDP action of a verdict.
#[inline(always)]
pub fn action(verdict: Verdict, egress: &DevMapHash) -> Result<u32, Reason> {
    match verdict {
        Verdict::Pass => Ok(xdp_action::XDP_PASS),
        Verdict::Drop => Ok(xdp_action::XDP_DROP),
        Verdict::Transmit => Ok(xdp_action::XDP_TX),
        // Nothing was there to jump to.
        Verdict::Stage(_) => Err(Reason::StageMissing),
        Verdict::Redirect(ifindex) => egress.redirect(ifindex, 0).map_err(|_| Reason::NoEgress),
    }
}

/// The type of an XDP frame of this object, whose settings are this global.
#[macro_export]
macro_rules! settings_of {
    ($settings:ident) => {
        /// The settings of this object.
        pub struct Own;

        impl $crate::kernel::Settings for Own {
            #[inline(always)]
            fn kernel() -> u32 {
                $crate::kernel::global(&$settings).kernel
            }
        }

        /// A frame of this object.
        type Xdp<'a> = $crate::kernel::XdpFrame<'a, Own>;
    };
}

/// What every object ends with: its licence, and the panic handler that the language asks for.
#[macro_export]
macro_rules! object {
    () => {
        #[panic_handler]
        fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
            // Nothing here panics; the verifier would refuse the program if this could be reached.
            loop {}
        }

        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
    };
}
