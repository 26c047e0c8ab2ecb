//! The stage for QUIC: a packet whose connection id names a backend goes there, wherever its client is now.
//!
//! Reads only what no version of QUIC may change (RFC 8999), and the connection id by QUIC-LB
//! (draft-ietf-quic-load-balancers-21): in the clear, encrypted in one block, or in four passes. What cannot be
//! routed so (a client's first packets carry an id that it made up itself) is placed by its 5-tuple like any UDP.
//!
//! Reached by tail call from `ingress` with the frame as it came in; called natively by tests and fuzzers.
//!
//! Packets routed by id touch no flow table. Halves of ids lie in a per-CPU map because they do not fit the stack,
//! and lengths are applied by masks: each branch would double what the verifier walks.

pub mod aes;

use crate::{
    Frame, Packet, Tables, Verdict,
    forward::forward,
    icmp::too_big::run_stage,
    packet::{
        fib::Fib,
        network::Network,
        parse::parse_transport,
        verdict::{Outcome, Refusal},
    },
    select::{
        choose::{backend_of, choose},
        hash::flow_hash,
        service::lookup_service,
    },
};
use lb_common::{
    Reason,
    backend::flags::{DOWN, USED},
    quic::{QuicConfig, SERVER_ID_MAX, ServerIdKey, config_key},
    service::UDP,
    settings::IngressSettings,
};

/// The maps of QUIC-LB.
pub trait QuicTables {
    /// How ids of a config are read, by [`config_key`].
    fn quic_config(&self, key: u32) -> Option<&QuicConfig>;
    /// Backend with a server id.
    fn quic_server(&self, key: &ServerIdKey) -> Option<u32>;
    /// Calls `f` with memory to work in, of any contents: ids do not fit the stack.
    fn with_work<R>(&self, f: impl FnOnce(&mut Work) -> R) -> Option<R>;
    /// [`read_id`]. A function of its own in the kernel: verified once, and not for every way to get there.
    #[inline(always)]
    fn read_id(&self, service: u32, key: u32) -> Result<u32, Reason>
    where
        Self: Sized,
    {
        read_id(self, service, key)
    }
}

/// Memory to read an id in. Sizes are powers of two: masked indices are within bounds for the verifier too.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// A connection id as it lies in the packet: its first byte, server id, nonce.
    id: [u32; 8],
    /// Halves.
    left: [u8; 32],
    right: [u8; 32],
    /// What the map is asked.
    key: Key,
}

impl Work {
    #[inline(always)]
    fn bytes(&self) -> &[u8; 32] {
        zerocopy::transmute_ref!(&self.id)
    }

    /// Server id that was looked for last.
    pub fn server_id(&self) -> &[u8] {
        &self.key.0.id[..self.key.0.len.min(SERVER_ID_MAX as u8) as usize]
    }

    #[inline(always)]
    fn bytes_mut(&mut self) -> &mut [u8; 32] {
        zerocopy::transmute_mut!(&mut self.id)
    }
}

#[derive(Clone, Copy, Debug)]
struct Key(ServerIdKey);

impl Default for Key {
    fn default() -> Self {
        Self(ServerIdKey { service: 0, id: [0; SERVER_ID_MAX], len: 0 })
    }
}

/// A packet's ids begin with this bit where its header is long.
pub(crate) const LONG: u8 = 0x80;
/// Config id that no config has: not routable.
const UNROUTABLE: u8 = 7;
/// Bytes that are read of a connection id: its first, server id and nonce.
pub(crate) const ID_MAX: usize = 20;

/// Decides a packet's fate and carries it out on the frame.
#[inline(always)]
pub fn process<F: Frame + Fib, T: Tables + QuicTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
) -> (Verdict, Outcome) {
    run_stage(frame, tables, settings, |frame, network| balance(frame, tables, settings, network))
}

#[inline(always)]
fn balance<F: Frame + Fib, T: Tables + QuicTables>(
    frame: &mut F,
    tables: &T,
    settings: &IngressSettings,
    network: &mut Network,
) -> Result<(Verdict, Outcome), Refusal> {
    if network.fragment.is_some() || network.headers.protocol != UDP {
        return Err(Reason::OtherProtocol.into());
    }
    let (l4, l4_len) = (network.l4(), network.l4_len);
    parse_transport(&frame.packet(), l4, l4_len, &mut network.headers)?;
    let headers = &network.headers;
    let (service, _) = lookup_service(tables, headers)?;
    let view = tables.service(service).ok_or(Reason::BrokenTable)?;
    let hash = flow_hash(view.seed, headers);
    let routed = route(&frame.packet(), tables, service, l4 + 8, l4_len - 8);
    let (index, is_new) = match routed {
        Ok(backend) => {
            tables.count(Reason::QuicRouted);
            (backend, false)
        }
        Err(reason) => {
            tables.count(reason);
            let choice = choose(tables, service, view, headers, hash)?;
            // The verifier walks the rest once, and not for each way to choose.
            (choice.backend, core::hint::black_box(choice.is_new))
        }
    };
    let backend = backend_of(tables, index, service)?;
    let verdict = forward(frame, tables, settings, headers, (index, backend), hash)?;
    if settings.stats != 0 {
        tables.account(index, headers.ip_len, is_new);
    }
    Ok((verdict, Outcome::Forwarded { service, backend: index }))
}

/// The byte at an offset behind the UDP header, read with the one before it: of a check of a single byte at a
/// variable offset the verifier (6.18) learns nothing.
#[inline(always)]
fn byte(packet: &Packet, at: usize) -> Option<u8> {
    let pair: u16 = packet.read(at - 1)?;
    Some(pair.to_ne_bytes()[1])
}

/// Backend that a datagram's connection id names.
#[inline(always)]
pub(crate) fn route<T: Tables + QuicTables>(
    packet: &Packet,
    tables: &T,
    service: u32,
    start: usize,
    len: usize,
) -> Result<u32, Reason> {
    if len == 0 {
        return Err(Reason::QuicTruncated);
    }
    // The barriers keep LLVM from deriving one bounds check from another: the verifier does not follow.
    let start = core::hint::black_box(start);
    let first = byte(packet, start).ok_or(Reason::QuicTruncated)?;
    // Long: version, length of the id, the id. Short: the id, whose length only its config knows.
    let (at, room) = if first & LONG != 0 {
        if len < 6 {
            return Err(Reason::QuicTruncated);
        }
        let id_len = byte(packet, start + 5).ok_or(Reason::QuicTruncated)?;
        if len - 6 < id_len as usize {
            return Err(Reason::QuicTruncated);
        }
        (start + 6, id_len as usize)
    } else {
        (start + 1, len - 1)
    };
    if room == 0 {
        return Err(Reason::QuicShortId);
    }
    let at = core::hint::black_box(at);
    let octet = byte(packet, at).ok_or(Reason::QuicTruncated)?;
    if octet >> 5 == UNROUTABLE {
        return Err(Reason::QuicUnroutable);
    }
    let key = config_key(service, octet >> 5);
    let config = tables.quic_config(key).ok_or(Reason::QuicUnroutable)?;
    let (id_len, nonce_len) = (config.server_id_len as u32, config.nonce_len as u32);
    if room < (1 + id_len + nonce_len) as usize {
        return Err(Reason::QuicShortId);
    }
    // What follows a connection id is longer than any (a packet number and a tag), so that one check does.
    if at + ID_MAX > start + len {
        return Err(Reason::QuicTruncated);
    }
    let id: [u32; ID_MAX / 4] = packet.read(at).ok_or(Reason::QuicTruncated)?;
    tables.with_work(|work| work.id[..ID_MAX / 4].copy_from_slice(&id)).ok_or(Reason::BrokenTable)?;
    let backend = tables.read_id(service, key)?;
    match tables.backend(backend) {
        // Its connections are gone with it; another backend's stateless reset tells the client.
        Some(entry) if entry.flags & (USED | DOWN) == USED && entry.service == service => Ok(backend),
        _ => Err(Reason::QuicUnknownId),
    }
}

/// Backend that the connection id in the memory to work in names, by the config with this key.
#[inline(always)]
pub fn read_id<T: QuicTables>(tables: &T, service: u32, key: u32) -> Result<u32, Reason> {
    let config = tables.quic_config(key).ok_or(Reason::QuicUnroutable)?;
    let (id_len, nonce_len) = (config.server_id_len as u32, config.nonce_len as u32);
    tables
        .with_work(|work| {
            if config.keyed != 0 {
                if id_len + nonce_len == 16 {
                    decrypt_block(config, work);
                } else {
                    // Called from here one by one: frames of functions that call each other add up.
                    split(work, id_len + nonce_len);
                    undo_passes(config, work, id_len + nonce_len, id_len);
                    join(work, id_len + nonce_len);
                }
            }
            for i in 0..SERVER_ID_MAX {
                work.key.0.id[i] = work.bytes()[1 + i] & below(i, id_len);
            }
            (work.key.0.service, work.key.0.len) = (service, id_len as u8);
            tables.quic_server(&work.key.0).ok_or(Reason::QuicUnknownId)
        })
        .ok_or(Reason::BrokenTable)?
}

/// [`read_id`]'s result as one number, for functions that can return no more.
#[inline(always)]
pub fn encode(found: Result<u32, Reason>) -> u64 {
    match found {
        Ok(backend) => backend as u64,
        Err(Reason::QuicUnroutable) => u64::MAX - 1,
        Err(Reason::QuicUnknownId) => u64::MAX - 2,
        Err(_) => u64::MAX,
    }
}

/// The inverse of [`encode`].
#[inline(always)]
pub fn decode(word: u64) -> Result<u32, Reason> {
    match word {
        0..=0xffff_ffff => Ok(word as u32),
        _ if word == u64::MAX - 1 => Err(Reason::QuicUnroutable),
        _ if word == u64::MAX - 2 => Err(Reason::QuicUnknownId),
        _ => Err(Reason::BrokenTable),
    }
}

/// All ones where `i` is below `n`, else zero; without a branch, of which the verifier would walk both ways.
#[inline(always)]
const fn below(i: usize, n: u32) -> u8 {
    ((i as i32 - n as i32) >> 31) as u8
}

#[inline(always)]
fn words(bytes: &[u8; 32], at: usize) -> [u32; 4] {
    let word = |i: usize| u32::from_be_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
    [word(at), word(at + 4), word(at + 8), word(at + 12)]
}

#[inline(always)]
fn byte_of(words: &[u32; 4], i: usize) -> u8 {
    (words[i / 4] >> (24 - 8 * (i % 4))) as u8
}

/// Server id and nonce together are one block.
#[inline(never)]
fn decrypt_block(config: &QuicConfig, work: &mut Work) {
    let bytes = work.bytes_mut();
    let mut block = words(bytes, 1);
    aes::decrypt(&config.keys, &mut block);
    for i in 0..16 {
        bytes[1 + i] = byte_of(&block, i);
    }
}

/// Bytes of half an id, rounded up: at most.
const HALF_MAX: usize = 10;
/// Of an index into [`Work`].
const MASK: usize = 31;

/// Any other length: a Feistel network of four passes, undone (section 5.5.2 of the draft). The last pass is
/// needed only where the server id reaches into the right half.
#[inline(never)]
fn undo_passes(config: &QuicConfig, work: &mut Work, len: u32, id_len: u32) {
    // Passes of even number change the left half by the right one.
    mix(config, &work.right, &mut work.left, len, 4);
    trim(work, len);
    mix(config, &work.left, &mut work.right, len, 3);
    trim(work, len);
    mix(config, &work.right, &mut work.left, len, 2);
    trim(work, len);
    if id_len > len / 2 {
        mix(config, &work.left, &mut work.right, len, 1);
        trim(work, len);
    }
}

/// Halves of an id.
#[inline(never)]
fn split(work: &mut Work, len: u32) {
    let half = len.div_ceil(2);
    for i in 0..16 {
        work.left[i] = work.bytes()[1 + i] & below(i, half);
        work.right[i] = work.bytes()[(1 + (len / 2) as usize + i) & MASK] & below(i, half);
    }
    trim(work, len);
}

/// The middle byte of an odd length belongs half to each.
#[inline(always)]
fn trim(work: &mut Work, len: u32) {
    let odd = 0u8.wrapping_sub((len & 1) as u8);
    work.left[(len / 2) as usize & MASK] &= !(odd & 0x0f);
    work.right[0] &= !(odd & 0xf0);
}

/// The id of its halves.
#[inline(never)]
fn join(work: &mut Work, len: u32) {
    let half = len.div_ceil(2);
    for i in 0..HALF_MAX {
        let (kept, half) = (work.bytes()[1 + i], below(i, half));
        work.bytes_mut()[1 + i] = kept & !half | work.left[i];
    }
    for i in 0..HALF_MAX {
        let at = (1 + (len / 2) as usize + i) & MASK;
        // In the middle byte of an odd length both halves meet.
        let meets = if i == 0 { 0u8.wrapping_sub((len & 1) as u8) } else { 0 };
        let replaced = below(i, half) & !meets;
        work.bytes_mut()[at] = work.bytes()[at] & !replaced | work.right[i];
    }
}

/// Adds the encryption of one half to the other.
#[inline(never)]
fn mix(config: &QuicConfig, from: &[u8; 32], to: &mut [u8; 32], len: u32, pass: u32) {
    let half = len.div_ceil(2);
    let mut block = words(from, 0);
    block[3] = block[3] & 0xffff_0000 | len << 8 | pass;
    aes::encrypt(&config.keys, &mut block);
    for (i, to) in to.iter_mut().enumerate().take(HALF_MAX) {
        *to ^= byte_of(&block, i) & below(i, half);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len() / 2).map(|i| u8::from_str_radix(&text[i * 2..i * 2 + 2], 16).unwrap()).collect()
    }

    fn read(key: &str, cid: &str, id_len: usize, nonce_len: usize) -> Vec<u8> {
        let config = QuicConfig {
            server_id_len: id_len as u8,
            nonce_len: nonce_len as u8,
            keyed: 1,
            pad: 0,
            keys: aes::expand(hex(key).try_into().unwrap()),
        };
        // What the last packet left.
        let mut work = Work { id: [0xa5a5_a5a5; 8], left: [0xa5; 32], right: [0xa5; 32], ..Work::default() };
        let bytes = hex(cid);
        assert_eq!(bytes.len(), 1 + id_len + nonce_len);
        work.bytes_mut()[..bytes.len()].copy_from_slice(&bytes);
        if id_len + nonce_len == 16 {
            decrypt_block(&config, &mut work);
        } else {
            let len = (id_len + nonce_len) as u32;
            split(&mut work, len);
            undo_passes(&config, &mut work, len, id_len as u32);
            join(&mut work, len);
        }
        work.bytes()[1..1 + id_len].to_vec()
    }

    /// Appendix B.2 of the draft, and the example of its section 5.4.3.
    #[test]
    fn the_drafts_vectors() {
        let key = "8f95f09245765f80256934e50c66207f";
        for (cid, id, nonce_len) in [
            ("0720b1d07b359d3c", "ed793a", 4),
            ("2fcc381bc74cb4fbad2823a3d1f8fed2", "ed793a51d49b8f5fab65", 5),
            ("504dd2d05a7b0de9b2b9907afb5ecf8cc3", "ed793a51d49b8f5f", 8),
            ("125779c9cc86beb3a3a4a3ca96fce4bfe0cdbc", "ed793a51d49b8f5fab", 9),
        ] {
            assert_eq!(read(key, cid, id.len() / 2, nonce_len), hex(id), "{cid}");
        }
        assert_eq!(read("fdf726a9893ec05c0632d3956680baf0", "0767947d29be054a", 3, 4), hex("31441a"));
    }
}
