//! Headers as they lie in a packet. Each is read or written with one bounds check, and word by word:
//! BPF would access a byte array byte by byte. Numbers are in network byte order as loaded.

use crate::packet::Bytes;

/// Declares headers and asserts that they have no padding.
macro_rules! headers {
    ($($(#[$meta:meta])* $name:ident = $size:literal { $($(#[$field_meta:meta])* $field:ident: $ty:ty,)+ })+) => { $(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name { $($(#[$field_meta])* pub $field: $ty,)+ }
        const _: () = assert!(size_of::<$name>() == $size && 0 $(+ size_of::<$ty>())+ == $size);
        // SAFETY: integers only, and the assertion above rules padding out.
        unsafe impl Bytes for $name {}
    )+ };
}

headers! {
    /// IPv4 without options (RFC 791).
    Ipv4 = 20 {
        /// Version, and header length in words.
        version_len: u8,
        /// DSCP and ECN.
        tos: u8,
        /// Length with this header.
        total_len: u16,
        /// Identification.
        id: u16,
        /// Flags and fragment offset.
        fragment: u16,
        /// Time to live.
        ttl: u8,
        /// Protocol.
        protocol: u8,
        /// Header checksum.
        check: u16,
        /// Source address.
        source: u32,
        /// Destination address.
        destination: u32,
    }
    /// IPv6 (RFC 8200).
    Ipv6 = 40 {
        /// Version, traffic class and flow label.
        version_class_label: u32,
        /// Length without this header.
        payload_len: u16,
        /// Next header.
        next: u8,
        /// Hop limit.
        hop_limit: u8,
        /// Source address.
        source: [u32; 4],
        /// Destination address.
        destination: [u32; 4],
    }
    /// TCP without options (RFC 9293).
    Tcp = 20 {
        /// Source port.
        source_port: u16,
        /// Destination port.
        port: u16,
        /// Sequence number.
        sequence: u32,
        /// Acknowledgement number.
        acknowledgement: u32,
        /// Data offset in words in the upper half.
        offset: u8,
        /// Flags.
        flags: u8,
        /// Window.
        window: u16,
        /// Checksum.
        check: u16,
        /// Urgent pointer.
        urgent: u16,
    }
    /// UDP (RFC 768).
    Udp = 8 {
        /// Source port.
        source_port: u16,
        /// Destination port.
        port: u16,
        /// Length with this header.
        len: u16,
        /// Checksum, 0 for none.
        check: u16,
    }
    /// GUE, variant 0, without fields (draft-ietf-intarea-gue).
    Gue = 4 {
        /// Variant, control bit, length of fields in words.
        variant_control_len: u8,
        /// IP protocol of what follows.
        protocol: u8,
        /// Flags.
        flags: u16,
    }
    /// Private data of GUE that names other backends, with an outer IPv4 header. `chain` has the format.
    Chain4 = 12 {
        /// What it is.
        kind: u16,
        /// Version, and addresses left.
        version_left: u8,
        /// Workers that sent it on.
        hops: u8,
        /// The addresses.
        next: [u32; 2],
    }
    /// The same with an outer IPv6 header.
    Chain6 = 36 {
        /// What it is.
        kind: u16,
        /// Version, and addresses left.
        version_left: u8,
        /// Workers that sent it on.
        hops: u8,
        /// The addresses.
        next: [u32; 8],
    }
    /// IPv6 extension header: its first four bytes.
    Extension = 4 {
        /// What follows it.
        next: u8,
        /// Length in 8 bytes, the first not counted.
        len: u8,
        /// Routing: its type, and segments left. Fragment: offset and flags.
        more: u16,
    }
    /// The addresses of an Ethernet header.
    Macs = 12 {
        /// Destination, first half; both halves of both follow.
        words: [u16; 6],
    }
    /// ICMP and ICMPv6 echo (RFC 792, RFC 4443); the beginning of every message is alike.
    Echo = 8 {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Checksum.
        check: u16,
        /// Identifier and sequence number.
        id: [u16; 2],
    }
    /// ICMP and ICMPv6 errors (RFC 792, RFC 1191, RFC 4443).
    IcmpError = 8 {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
        /// Checksum.
        check: u16,
        /// IPv4: unused, then the MTU. IPv6: the MTU.
        mtu: [u16; 2],
    }
}
