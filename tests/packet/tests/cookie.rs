//! SYNs on a worker: answered by the listener's cookie while the listener would do so itself, and the stack's
//! otherwise. The listener is real, in a network namespace of the test's own.

use lb_common::{
    Address, Reason, mapped,
    reply::{ReplyHop, family},
    service::TCP,
    settings::DecapSettings,
};
use std::{
    fs,
    net::TcpListener,
    process::Command,
    sync::{Mutex, OnceLock, PoisonError},
};
use test_packet::{Decap, Packet, Run, SEQUENCE, Vlan, bed, checksum, checksum_is_right, xdp};

const VIP4: Address = mapped([192, 0, 2, 1]);
const VIP6: Address = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
const CLIENT4: Address = mapped([198, 51, 100, 7]);
const CLIENT6: Address = [0x20, 1, 0x0d, 0xb8, 0, 0xc, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
const OURS: Address = mapped([10, 1, 0, 1]);
const PORT: u16 = 8_080;
const SYN: u8 = 2;
const ROUTER: [u8; 6] = [2, 0, 0, 0, 9, 9];
const MINE: [u8; 6] = [2, 0, 0, 0, 9, 1];

/// When listeners answer by cookie.
const ALWAYS: &str = "2";
const WHEN_FULL: &str = "1";

/// Runs `f` with listeners on both VIPs that answer by cookie when `cookies` says.
fn with<R>(cookies: &str, f: impl FnOnce(&mut Decap) -> R) -> R {
    static LISTENERS: OnceLock<Vec<TcpListener>> = OnceLock::new();
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    bed::enter();
    LISTENERS.get_or_init(|| {
        for line in [
            "link set lo up",
            "addr replace 192.0.2.1/32 dev lo",
            // Usable at once, without a look for duplicates.
            "addr replace 2001:db8::1/128 dev lo nodad",
        ] {
            let added = Command::new("ip").args(line.split(' ')).status();
            assert!(added.expect("ip runs").success(), "ip {line}");
        }
        let on = |address: &str| TcpListener::bind((address, PORT)).expect("the VIP is there");
        vec![on("192.0.2.1"), on("2001:db8::1")]
    });
    // Of the network namespace of the thread that opens it.
    fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).expect("a setting");
    let mut decap = Decap::load(DecapSettings::DEFAULT, &[OURS], &[VIP4, VIP6]).expect("loads");
    let hop = ReplyHop { next_hop: ROUTER, egress_mac: MINE, ifindex: bed::INGRESS, ..ReplyHop::default() };
    decap.reply_hop(family::V4, hop);
    decap.reply_hop(family::V6, hop);
    f(&mut decap)
}

/// A SYN, its MSS option and all.
fn syn(is_ipv6: bool) -> Packet {
    let (source, vip) = if is_ipv6 { (CLIENT6, VIP6) } else { (CLIENT4, VIP4) };
    Packet { flags: SYN, payload: vec![], ..Packet::new(TCP, (source, 40_001), (vip, PORT)) }
}

/// The frame of a packet with 4 bytes of TCP options.
fn ip_of(packet: &Packet, mss: u16) -> Vec<u8> {
    let with_room = Packet { payload: [&[2, 4][..], &mss.to_be_bytes()].concat(), ..packet.clone() };
    let mut ip = with_room.ip();
    let l4 = ip.len() - 24;
    ip[l4 + 12] = 0x60;
    ip
}

/// The same in an ipip tunnel to this worker.
fn tunnelled(packet: &Packet, ip: Vec<u8>) -> Vec<u8> {
    let protocol = if packet.destination.0 == VIP6 { 41 } else { 4 };
    let outer =
        Packet { payload: ip, vlan: packet.vlan, ..Packet::new(17, (mapped([10, 9, 9, 9]), 0), (OURS, 0)) };
    outer.around(protocol)
}

fn run(decap: &Decap, packet: &Packet, mss: u16) -> Run {
    decap.run(&tunnelled(packet, ip_of(packet, mss))).expect("the kernel runs it")
}

/// Reads a SYN-ACK, checks all of it but the cookie and the MSS, which are returned.
fn read(frame: &[u8], packet: &Packet) -> (u32, u16) {
    let is_ipv6 = packet.destination.0 == VIP6;
    let l4 = 14 + if is_ipv6 { 40 } else { 20 };
    assert_eq!(frame.len(), l4 + 24);
    assert_eq!(frame[..12], [ROUTER, MINE].concat());
    let (vip, client) = (packet.destination.0, packet.source.0);
    let pseudo = if is_ipv6 {
        assert_eq!(frame[12..22], [0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, 6, 64]);
        assert_eq!(frame[22..54], [vip, client].concat());
        [&vip[..], &client, &[0, 0, 0, 24, 0, 0, 0, 6], &frame[l4..]].concat()
    } else {
        assert_eq!(frame[12..24], [0x08, 0, 0x45, 0, 0, 44, 0, 0, 0x40, 0, 64, 6]);
        assert!(checksum_is_right(&frame[14..34]));
        assert_eq!(frame[26..34], [&vip[12..], &client[12..]].concat());
        [&vip[12..], &client[12..], &[0, 6, 0, 24], &frame[l4..]].concat()
    };
    assert_eq!(checksum(&pseudo), 0xffff, "the TCP checksum is right");
    let word = |at: usize| u32::from_be_bytes(frame[l4 + at..l4 + at + 4].try_into().expect("four"));
    assert_eq!(word(0), u32::from(PORT) << 16 | 40_001);
    assert_eq!(word(8), SEQUENCE + 1);
    assert_eq!(frame[l4 + 12..l4 + 16], [0x60, 0x12, 0xff, 0xff]);
    assert_eq!(frame[l4 + 18..l4 + 22], [0, 0, 2, 4]);
    (word(4), u16::from_be_bytes([frame[l4 + 22], frame[l4 + 23]]))
}

#[test]
fn a_syn_is_answered_by_cookie() {
    with(ALWAYS, |decap| {
        for is_ipv6 in [false, true] {
            let packet = syn(is_ipv6);
            let answer = run(decap, &packet, 1_460);
            assert_eq!(answer.verdict, xdp::TX);
            let (cookie, mss) = read(&answer.packet, &packet);
            // The table of a cookie's MSS has 1,460 and 1,440 (net/ipv4 and net/ipv6 syncookies.c).
            assert_eq!(mss, if is_ipv6 { 1_440 } else { 1_460 });
            let other = Packet { source: (packet.source.0, 40_002), ..packet.clone() };
            let answer = run(decap, &other, 1_460);
            let frame = &answer.packet;
            let at = frame.len() - 20;
            assert_ne!(frame[at..at + 4], cookie.to_be_bytes(), "another client, another cookie");
            assert_eq!(decap.take_counts(), [(Reason::DecapIpip, 2), (Reason::DecapCookie, 2)]);
        }
    });
}

#[test]
fn a_small_mss_is_kept_and_no_option_is_fine() {
    with(ALWAYS, |decap| {
        let packet = syn(false);
        let answer = run(decap, &packet, 600);
        assert_eq!(read(&answer.packet, &packet).1, 536);
        // No options: the SYN is shorter than its answer.
        let answer = decap.run(&tunnelled(&packet, packet.ip())).expect("runs");
        assert_eq!((answer.verdict, read(&answer.packet, &packet).1), (xdp::TX, 536));
        // Data in the SYN is not acknowledged.
        let data = Packet { payload: vec![7; 100], ..packet.clone() };
        let answer = decap.run(&tunnelled(&data, data.ip())).expect("runs");
        assert_eq!((answer.verdict, read(&answer.packet, &packet).1), (xdp::TX, 536));
    });
}

/// Without a flood, and whatever is not a plain SYN of a listener, is the stack's.
#[test]
fn the_rest_is_the_stacks() {
    let stays = |decap: &mut Decap, what: &str, frame: Vec<u8>| {
        let run = decap.run(&frame).expect("runs");
        assert_eq!(run.verdict, xdp::PASS, "{what}");
        assert_eq!(decap.take_counts(), [(Reason::DecapIpip, 1)], "{what}");
    };
    with(WHEN_FULL, |decap| {
        for is_ipv6 in [false, true] {
            let packet = syn(is_ipv6);
            stays(decap, "the listener's queue is not full", tunnelled(&packet, ip_of(&packet, 1_460)));
        }
    });
    with(ALWAYS, |decap| {
        for is_ipv6 in [false, true] {
            let plain = syn(is_ipv6);
            let nobody = Packet { destination: (plain.destination.0, PORT + 1), ..plain.clone() };
            stays(decap, "nobody listens", tunnelled(&nobody, ip_of(&nobody, 1_460)));
            for flags in [0x10, 0x12, 0x04, 0x03, 0x06] {
                let other = Packet { flags, ..plain.clone() };
                stays(decap, "no SYN", tunnelled(&other, ip_of(&other, 1_460)));
            }
            let tagged = Packet { vlan: Vlan::One, ..plain.clone() };
            stays(decap, "tagged", tunnelled(&tagged, ip_of(&tagged, 1_460)));
            let mut short = ip_of(&plain, 1_460);
            let at = short.len() - 12;
            short[at] = 0x40;
            stays(decap, "a header of 16 bytes", tunnelled(&plain, short));
            let mut long = ip_of(&plain, 1_460);
            long[at] = 0xf0;
            stays(decap, "a header longer than the packet", tunnelled(&plain, long));
        }
        let options = Packet { options: vec![1; 4], ..syn(false) };
        stays(decap, "IP options", tunnelled(&options, options.ip()));
        let extensions = Packet { extensions: vec![(0, vec![0; 7])], ..syn(true) };
        stays(decap, "extension headers", tunnelled(&extensions, extensions.ip()));
        decap.reply_hop(family::V4, ReplyHop::default());
        let packet = syn(false);
        stays(decap, "no way back", tunnelled(&packet, ip_of(&packet, 1_460)));
    });
}
