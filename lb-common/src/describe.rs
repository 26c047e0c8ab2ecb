//! Layout of the map types, field by field, so that another version of this crate can read maps that it did not make.
//!
//! `lbd` writes it beside the maps ([`crate::names::LAYOUT`]). A reader finds fields by name: a field keeps its name
//! while its meaning and form stay the same, and gets another name when either changes.

use crate::{
    backend::Backend,
    flow::{Flow, FlowKey},
    names,
    nat::{LastHop, Nat, Reply, ReplyKey},
    service::{PortRange, ServiceKey, Vip, VipKey},
    syn_cache::SynCacheLine,
};
use core::mem::offset_of;

/// A field of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name of the field.
    pub name: &'static str,
    /// Offset in the record, in bytes.
    pub offset: usize,
    /// Size in bytes.
    pub size: usize,
    /// Name of the record that the field is, or is an array of; none for plain numbers.
    pub of: Option<&'static str>,
}

/// A key or a value of a map, or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Name of the record.
    pub name: &'static str,
    /// Size in bytes.
    pub size: usize,
    /// All fields.
    pub fields: &'static [Field],
}

/// A map that another version reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapOf {
    /// Name of the map.
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
    SynCacheLine { swept, heads, sequences, swept_second, added };
    LastHop { macs, tags, ifindex };
    Nat { source, worker, source_port, port, backend, created_s, last_seen_s, flags, hop: LastHop };
    ReplyKey { worker, source, port, source_port, protocol };
    Reply { flow: FlowKey, vip, hop: LastHop, last_seen_s, flags };
}

/// Maps that another version reads: the index of each service and backend, and the flows.
pub const MAPS: &[MapOf] = &[
    MapOf { name: names::SERVICE_INDEX, key: "ServiceKey", value: "u32" },
    MapOf { name: names::VIPS, key: "VipKey", value: "Vip" },
    MapOf { name: names::BACKENDS, key: "u32", value: "Backend" },
    MapOf { name: names::FLOWS, key: "FlowKey", value: "Flow" },
    MapOf { name: names::SYN_CACHE, key: "u32", value: "SynCacheLine" },
    MapOf { name: names::UDP_FLOWS, key: "FlowKey", value: "Flow" },
    MapOf { name: names::NAT_FLOWS, key: "FlowKey", value: "Nat" },
    MapOf { name: names::NAT_REPLIES, key: "ReplyKey", value: "Reply" },
];

/// Fields (record, field) that are read as zero when the other version lacks them. A field that is needed to follow a
/// flow is not in this list.
pub const OPTIONAL_FIELDS: &[(&str, &str)] = &[
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
    ("SynCacheLine", "swept"),
    ("SynCacheLine", "swept_second"),
    ("SynCacheLine", "added"),
];
