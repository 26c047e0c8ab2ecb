//! What map types look like, field by field, so that another version of this crate can read maps that it did not make.
//!
//! `lbd` writes this beside the maps ([`crate::names::LAYOUT`]). A reader goes by names: a field keeps its name for as
//! long as it keeps its meaning and its form, and gets another when either changes.

use crate::{
    backend::Backend,
    flow::{Flow, FlowKey},
    names,
    nat::{LastHop, Nat, Reply, ReplyKey},
    note::Line as NoteLine,
    service::{PortRange, ServiceKey, Vip, VipKey},
};
use core::mem::offset_of;

/// A field of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Where it begins, in bytes.
    pub offset: usize,
    /// Its bytes.
    pub size: usize,
    /// The record that it is, or is an array of.
    pub of: Option<&'static str>,
}

/// A key or a value of a map, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its name.
    pub name: &'static str,
    /// Its bytes.
    pub size: usize,
    /// All of its fields.
    pub fields: &'static [Field],
}

/// A map that is read by another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapOf {
    /// Its name.
    pub name: &'static str,
    /// Record of its keys.
    pub key: &'static str,
    /// Record of its values.
    pub value: &'static str,
}

const fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

macro_rules! describe {
    ($($(#[$cfg:meta])? $ty:ident { $($field:ident $(: $of:ident)?),* };)+) => {
        $($(#[$cfg])? const _: () = assert!(0 $(+ size_of_field(|t: &$ty| &t.$field))* == size_of::<$ty>());)+
        /// All records.
        pub const RECORDS: &[Record] = &[
            WORD,
            $($(#[$cfg])? Record {
                name: stringify!($ty),
                size: size_of::<$ty>(),
                fields: &[$(Field {
                    name: stringify!($field),
                    offset: offset_of!($ty, $field),
                    size: size_of_field(|t: &$ty| &t.$field),
                    of: describe!(@of $($of)?),
                }),*],
            }),+
        ];
    };
    (@of) => { None };
    (@of $of:ident) => { Some(stringify!($of)) };
}

/// A number in the host's byte order.
const WORD: Record =
    Record { name: "u32", size: 4, fields: &[Field { name: "value", offset: 0, size: 4, of: None }] };

describe! {
    ServiceKey { vip, port, protocol, pad };
    VipKey { vip };
    PortRange { first, last, protocol, service };
    Vip { any_tcp, any_udp, range_count, pad, ranges: PortRange };
    Backend { address, source, next_hop, mtu, egress_mac, vlan, ifindex, flags, mode, source_bits, port, service };
    FlowKey { source, source_port, port, service };
    #[cfg(not(feature = "other-abi"))]
    Flow { backend, last_seen_s, created_s, flags };
    #[cfg(feature = "other-abi")]
    Flow { backend, last_seen_s, created_s, flags, other };
    NoteLine { settled, settled_too, recent, heads, sequences };
    LastHop { macs, tags, ifindex };
    Nat { source, worker, source_port, port, backend, created_s, last_seen_s, flags, hop: LastHop };
    ReplyKey { worker, source, port, source_port, protocol };
    Reply { flow: FlowKey, vip, hop: LastHop, last_seen_s, flags };
}

/// Maps that another version reads: who has which index, and the flows.
pub const MAPS: &[MapOf] = &[
    MapOf { name: names::SERVICE_INDEX, key: "ServiceKey", value: "u32" },
    MapOf { name: names::VIPS, key: "VipKey", value: "Vip" },
    MapOf { name: names::BACKENDS, key: "u32", value: "Backend" },
    MapOf { name: names::FLOWS, key: "FlowKey", value: "Flow" },
    MapOf { name: names::NOTES, key: "u32", value: "NoteLine" },
    MapOf { name: names::UDP_FLOWS, key: "FlowKey", value: "Flow" },
    MapOf { name: names::NAT_FLOWS, key: "FlowKey", value: "Nat" },
    MapOf { name: names::NAT_REPLIES, key: "ReplyKey", value: "Reply" },
];

/// Fields (record, field) for which zero does where another version has none: what a flow cannot be followed without
/// is not among them.
pub const MAY_LACK: &[(&str, &str)] = &[
    ("ServiceKey", "pad"),
    ("Vip", "pad"),
    ("Backend", "source"),
    ("Backend", "next_hop"),
    ("Backend", "mtu"),
    ("Backend", "egress_mac"),
    ("Backend", "vlan"),
    ("Backend", "ifindex"),
    ("Backend", "mode"),
    ("Backend", "source_bits"),
    ("Backend", "port"),
    ("Flow", "other"),
    ("Nat", "created_s"),
    ("NoteLine", "settled"),
    ("NoteLine", "settled_too"),
    ("NoteLine", "recent"),
];
