//! A frame in a vector.

use super::std::{boxed::Box, cell::RefCell, vec, vec::Vec};
use crate::{
    Frame, Packet,
    packet::{
        Sum,
        fib::{Fib, FibAnswer, FibQuery},
    },
    second_chance::worker::{SocketQuery, Sockets},
};
use core::cell::UnsafeCell;
use lb_common::Reason;

/// Room that the kernel leaves in front of a packet (`XDP_PACKET_HEADROOM`).
const HEADROOM: usize = 256;
/// Room behind it.
const TAILROOM: usize = 128;

/// How an end was moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adjust {
    /// `adjust_head` by so many bytes.
    Head(i32),
    /// `adjust_tail` by so many bytes.
    Tail(i32),
}

/// Answers in the FIB's place.
pub type FibFn = fn(&FibQuery) -> Result<FibAnswer, (Reason, u32)>;

/// A frame whose bytes lie in a vector.
pub struct VecFrame {
    buffer: UnsafeCell<Box<[u8]>>,
    len: usize,
    start: usize,
    end: usize,
    /// Where the linear part ends in the buffer; `end` or less.
    linear_end: usize,
    ifindex: u32,
    adjusts: Vec<Adjust>,
    fib: FibFn,
    mtu: Option<u32>,
    queries: RefCell<Vec<FibQuery>>,
    sockets: fn(&SocketQuery) -> bool,
}

impl VecFrame {
    /// A frame of these bytes, with the room that the kernel gives.
    pub fn new(bytes: &[u8]) -> Self {
        Self::with_room(bytes, HEADROOM, TAILROOM)
    }

    /// A frame with so many bytes in front and behind. The room is filled with 0xa5, so that what a
    /// program forgets to write shows.
    pub fn with_room(bytes: &[u8], headroom: usize, tailroom: usize) -> Self {
        let mut all = vec![0xa5; headroom];
        all.extend_from_slice(bytes);
        all.resize(headroom + bytes.len() + tailroom, 0xa5);
        let end = headroom + bytes.len();
        Self {
            len: all.len(),
            buffer: UnsafeCell::new(all.into_boxed_slice()),
            start: headroom,
            end,
            linear_end: end,
            ifindex: 1,
            adjusts: Vec::new(),
            fib: |_| Err((Reason::NoRoute, 0)),
            mtu: None,
            queries: RefCell::default(),
            sockets: |_| false,
        }
    }

    /// The same with only the first `len` bytes in the linear part.
    #[must_use]
    pub fn linear(mut self, len: usize) -> Self {
        self.linear_end = self.end.min(self.start.saturating_add(len));
        self
    }

    /// The same, come in by another interface than 1.
    #[must_use]
    pub fn from_interface(mut self, ifindex: u32) -> Self {
        self.ifindex = ifindex;
        self
    }

    /// The same with these answers from the FIB; without them there is no route to anywhere.
    #[must_use]
    pub fn with_fib(mut self, fib: FibFn) -> Self {
        self.fib = fib;
        self
    }

    /// The same with this MTU on every interface.
    #[must_use]
    pub fn with_mtu(mut self, mtu: u32) -> Self {
        self.mtu = Some(mtu);
        self
    }

    /// The same with these sockets; without them there are none.
    #[must_use]
    pub fn with_sockets(mut self, sockets: fn(&SocketQuery) -> bool) -> Self {
        self.sockets = sockets;
        self
    }

    /// The frame's bytes as they are now.
    pub fn bytes(&self) -> Vec<u8> {
        // SAFETY: nobody else holds a reference into the buffer: windows are used within one call, and
        // the frame cannot be shared between threads.
        let buffer = unsafe { &*self.buffer.get() };
        buffer[self.start..self.end].to_vec()
    }

    /// How its ends were moved, in order.
    pub fn adjusts(&self) -> &[Adjust] {
        &self.adjusts
    }

    /// What the FIB was asked, in order.
    pub fn queries(&self) -> Vec<FibQuery> {
        self.queries.borrow().clone()
    }
}

impl Frame for VecFrame {
    fn packet(&self) -> Packet {
        // SAFETY: as in `bytes`.
        let base = unsafe { (*self.buffer.get()).as_mut_ptr() } as usize;
        // SAFETY: both lie in the buffer, whose cell may be written through a shared reference; it does
        // not move while the frame lives.
        unsafe { Packet::new(base + self.start, base + self.linear_end) }
    }

    fn total_len(&self) -> usize {
        self.end - self.start
    }

    fn adjust_head(&mut self, delta: i32) -> bool {
        let Some(start) = self.start.checked_add_signed(delta as isize) else { return false };
        // As the kernel does: at least an Ethernet header stays in the linear part.
        if start + crate::packet::parse::ETHERNET > self.linear_end {
            return false;
        }
        self.adjusts.push(Adjust::Head(delta));
        self.start = start;
        true
    }

    fn adjust_tail(&mut self, delta: i32) -> bool {
        let Some(end) = self.end.checked_add_signed(delta as isize) else { return false };
        if end > self.len || end < self.start + crate::packet::parse::ETHERNET {
            return false;
        }
        self.adjusts.push(Adjust::Tail(delta));
        if self.linear_end == self.end {
            self.linear_end = end;
        }
        self.end = end;
        self.linear_end = self.linear_end.min(end);
        true
    }

    fn sum<const N: usize>(&self, offset: usize) -> Option<u32> {
        let packet = self.packet();
        let mut sum = 0u64;
        for i in (0..N).step_by(4) {
            sum += u64::from(packet.read::<u32>(offset + i)?);
        }
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        Some(((sum & 0xffff_ffff) + (sum >> 32)) as u32)
    }

    fn sum_of(&self, offset: usize, len: usize, _: &mut Sum) -> Option<u32> {
        let bytes = self.bytes();
        let mut sum = 0u64;
        for pair in bytes.get(offset..offset.checked_add(len)?)?.chunks(2) {
            sum += u64::from(u16::from_ne_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
        u32::try_from(sum).ok()
    }

    fn ifindex(&self) -> u32 {
        self.ifindex
    }
}

impl Fib for VecFrame {
    fn narrower(&self, _: u32, len: u32) -> Option<u32> {
        self.mtu.filter(|mtu| *mtu < len)
    }

    fn lookup(&self, query: &FibQuery) -> Result<FibAnswer, (Reason, u32)> {
        self.queries.borrow_mut().push(*query);
        (self.fib)(query)
    }
}

impl Sockets for VecFrame {
    fn has_flow(&self, query: &SocketQuery) -> bool {
        (self.sockets)(query)
    }
}
