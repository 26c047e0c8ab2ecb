//! Which service a packet belongs to: exact port, then port range, then any port.

use crate::{Tables, parse::Headers};
use lb_common::{
    Be16, Reason, ServiceKey, Vip, VipKey,
    limits::RANGES_PER_VIP,
    service::{NO_SERVICE, TCP},
};

/// How a service was found, for `explain`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    /// By exact port.
    Exact,
    /// By port range.
    Range,
    /// By any port.
    Any,
}

/// Index of the packet's service.
#[inline(always)]
pub fn lookup_service<T: Tables>(tables: &T, headers: &Headers) -> Result<(u32, Match), Reason> {
    let key = ServiceKey {
        vip: headers.destination_address(),
        port: Be16::from_bytes(headers.port.to_ne_bytes()),
        protocol: headers.protocol,
        pad: 0,
    };
    if let Some(index) = tables.service_index(&key) {
        return Ok((index, Match::Exact));
    }
    let vip = tables.vip(&VipKey { vip: key.vip }).ok_or(Reason::NotVip)?;
    lookup_port(vip, headers.protocol, u16::from_be(headers.port)).ok_or(Reason::NoService)
}

/// The same within a VIP, for ports that have no service of their own.
#[inline(always)]
fn lookup_port(vip: &Vip, protocol: u8, port: u16) -> Option<(u32, Match)> {
    for i in 0..RANGES_PER_VIP {
        if i as u32 >= vip.range_count {
            break;
        }
        let range = &vip.ranges[i];
        if range.protocol == protocol as u32 && range.first <= port && port <= range.last {
            return Some((range.service, Match::Range));
        }
    }
    let any = if protocol == TCP { vip.any_tcp } else { vip.any_udp };
    if any == NO_SERVICE { None } else { Some((any, Match::Any)) }
}
