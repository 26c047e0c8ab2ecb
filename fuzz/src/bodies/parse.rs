//! The parser against etherparse: whenever both accept a frame they agree on all that later stages use,
//! and where only one accepts it, the difference is one of those listed here.

use etherparse::{
    EtherType, LinkExtSlice, NetSlice, SlicedPacket, TransportSlice,
    err::{ipv6_exts::HeaderError, packet::SliceError},
};
use lb_common::{Reason, is_mapped, mapped, settings::IngressSettings};
use lb_ebpf::{
    native::VecFrame,
    packet::parse::{Headers, parse},
};

const AUTHENTICATION: u8 = 51;

/// What both readings are compared in.
#[derive(Debug, PartialEq, Eq)]
struct Reading {
    source: ([u8; 16], u16),
    destination: ([u8; 16], u16),
    protocol: u8,
    tcp_flags: u8,
    tos: u8,
    is_ipv6: bool,
    dont_fragment: bool,
    l2_len: usize,
    ip_len: usize,
}

impl Reading {
    fn ours(headers: &Headers) -> Self {
        Self {
            source: (headers.source_address(), u16::from_be(headers.source_port)),
            destination: (headers.destination_address(), u16::from_be(headers.port)),
            protocol: headers.protocol,
            tcp_flags: headers.tcp_flags,
            tos: headers.tos,
            is_ipv6: headers.is_ipv6,
            dont_fragment: headers.dont_fragment,
            l2_len: headers.l2_len,
            ip_len: headers.ip_len as usize,
        }
    }
}

/// What etherparse made of a frame, and what we do not look through.
struct Theirs {
    reading: Reading,
    has_macsec: bool,
    tags: usize,
    has_authentication: bool,
    extensions: usize,
    extension_bytes: usize,
    /// Segments left in some routing header.
    is_routed: bool,
    /// A length of zero, which etherparse takes for "all that is there" (jumbograms).
    has_zero_len: bool,
}

/// Checks one frame.
pub fn check(data: &[u8]) {
    let all = IngressSettings::DEFAULT;
    let ours = parse(&VecFrame::new(data), &all);
    match (&ours, theirs(data)) {
        (Ok(ours), Ok(theirs)) => assert_eq!(Reading::ours(ours), theirs.reading),
        // RFC 8200 4.1 wants hop-by-hop options first but tells receivers to take any order.
        (Ok(_), Err(Some(SliceError::Ipv6Exts(HeaderError::HopByHopNotAtStart)))) => {}
        (Ok(ours), Err(error)) => panic!("only we accept it, as {ours:?}; etherparse: {error:?}"),
        (Err(reason), Ok(theirs)) => {
            assert!(is_stated(*reason, &theirs), "{reason:?}, but etherparse reads {:?}", theirs.reading);
        }
        (Err(_), Err(_)) => {}
    }
    // RFC 4291 2.5.5.2: not on the wire. The maps keep IPv4 in this form, so such a packet would
    // otherwise pass for a flow of another family.
    if let Ok(ours) = &ours
        && ours.is_ipv6
    {
        let reading = Reading::ours(ours);
        assert!(!is_mapped(&reading.source.0) && !is_mapped(&reading.destination.0), "{reading:?}");
    }
    // What a switch turns off is passed on; all else reads as before.
    let without_ipv6 = parse(&VecFrame::new(data), &IngressSettings { ipv6: 0, ..all });
    assert!(without_ipv6 == ours || without_ipv6 == Err(Reason::Ipv6Off));
    let without_vlan = parse(&VecFrame::new(data), &IngressSettings { vlan: 0, ..all });
    assert!(without_vlan == ours || without_vlan == Err(Reason::VlanOff));
    // Headers outside the linear part are not seen, payload there does not matter.
    for linear in [14, 34, 54, 60, 128] {
        let part = parse(&VecFrame::new(data).linear(linear), &all);
        assert!(
            part == ours || part == Err(Reason::Truncated),
            "{linear} linear bytes: {part:?}, not {ours:?}"
        );
    }
}

/// Whether we refuse on purpose what etherparse takes.
fn is_stated(reason: Reason, theirs: &Theirs) -> bool {
    let is_mapped = |a: &[u8; 16]| theirs.reading.is_ipv6 && is_mapped(a);
    match reason {
        Reason::NotIp => theirs.has_macsec,
        Reason::TooManyVlans => theirs.tags > 2,
        Reason::OtherProtocol => theirs.has_authentication,
        Reason::BadExtension => theirs.extensions > 6 || theirs.extension_bytes > 400 || theirs.is_routed,
        Reason::BadTransport => theirs.has_zero_len,
        Reason::BadIpv6 => {
            theirs.has_zero_len
                || is_mapped(&theirs.reading.source.0)
                || is_mapped(&theirs.reading.destination.0)
        }
        _ => false,
    }
}

/// Etherparse's reading of a frame that holds a whole TCP or UDP packet.
fn theirs(data: &[u8]) -> Result<Theirs, Option<SliceError>> {
    let sliced = SlicedPacket::from_ethernet(data).map_err(Some)?;
    let is_tag = |kind| {
        [EtherType::VLAN_TAGGED_FRAME, EtherType::PROVIDER_BRIDGING, EtherType::VLAN_DOUBLE_TAGGED_FRAME]
            .contains(&kind)
    };
    let (mut has_macsec, mut l2_len, mut tags) = (false, 14, 0);
    for extension in &sliced.link_exts {
        l2_len += extension.header_len();
        match extension {
            LinkExtSlice::Vlan(tag) => tags += 1 + usize::from(tags == 2 && is_tag(tag.ether_type())),
            LinkExtSlice::Macsec(_) => has_macsec = true,
        }
    }
    let mut theirs = Theirs {
        reading: Reading {
            source: ([0; 16], 0),
            destination: ([0; 16], 0),
            protocol: 0,
            tcp_flags: 0,
            tos: 0,
            is_ipv6: false,
            dont_fragment: false,
            l2_len,
            ip_len: 0,
        },
        has_macsec,
        tags,
        has_authentication: false,
        extensions: 0,
        extension_bytes: 0,
        is_routed: false,
        has_zero_len: false,
    };
    network(sliced.net.ok_or(None)?, &mut theirs).ok_or(None)?;
    let reading = &mut theirs.reading;
    (reading.protocol, reading.source.1, reading.destination.1) = match sliced.transport.ok_or(None)? {
        TransportSlice::Tcp(tcp) => {
            reading.tcp_flags = tcp.slice()[13];
            (6, tcp.source_port(), tcp.destination_port())
        }
        TransportSlice::Udp(udp) => {
            theirs.has_zero_len |= udp.length() == 0;
            (17, udp.source_port(), udp.destination_port())
        }
        _ => return Err(None),
    };
    Ok(theirs)
}

fn network(net: NetSlice<'_>, theirs: &mut Theirs) -> Option<()> {
    let reading = &mut theirs.reading;
    match net {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            reading.source.0 = mapped(header.source());
            reading.destination.0 = mapped(header.destination());
            reading.tos = header.dcp().value() << 2 | header.ecn().value();
            reading.dont_fragment = header.dont_fragment();
            reading.ip_len = usize::from(header.total_len());
            theirs.has_authentication = ip.extensions().auth.is_some();
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            reading.source.0 = header.source();
            reading.destination.0 = header.destination();
            reading.tos = header.traffic_class();
            reading.is_ipv6 = true;
            reading.dont_fragment = true;
            reading.ip_len = 40 + usize::from(header.payload_length());
            theirs.has_zero_len = header.payload_length() == 0;
            extensions(header.next_header().0, ip.extensions().slice(), theirs);
        }
        NetSlice::Arp(_) => return None,
    }
    Some(())
}

/// Walks the extension headers that etherparse delimited.
fn extensions(mut next: u8, mut bytes: &[u8], theirs: &mut Theirs) {
    theirs.extension_bytes = bytes.len();
    while !bytes.is_empty() {
        let len = match next {
            44 => 8,
            AUTHENTICATION => (usize::from(bytes[1]) + 2) * 4,
            _ => (usize::from(bytes[1]) + 1) * 8,
        };
        theirs.extensions += 1;
        theirs.has_authentication |= next == AUTHENTICATION;
        theirs.is_routed |= next == 43 && bytes[3] != 0;
        (next, bytes) = (bytes[0], &bytes[len..]);
    }
}
