//! Packets that nobody can have sent, on a bed with a router that brings back what is addressed to a VIP, and with
//! workers that answer whatever they get: no packet makes the bed carry more than two for each that is sent.
//!
//! Without a check of sources a single datagram from a VIP to itself goes round for ever: each answer is a new packet
//! with a fresh TTL.

use std::{
    fs,
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lb_common::{
    Address, is_mapped, mapped,
    service::{TCP, UDP as UDP_NUMBER},
};
use test_support::{
    bed::{CLIENT_V4, CLIENT_V6, Layout, vip_v4, vip_v6},
    netns::Namespace,
    raw,
    stage::{ECHO, LINE, LINES, Plan, Stage, UDP},
    udp::Flows,
};

#[path = "../../packet/src/build.rs"]
#[allow(dead_code, reason = "the packet tests use the rest")]
mod build;
use build::{Packet, checksum};

/// How often each packet is sent.
const COPIES: u64 = 50;
/// What the bed carries of itself meanwhile: neighbour discovery.
const OWN: u64 = 40;

fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn parse(text: &str) -> Address {
    address(text.parse().expect("an address"))
}

/// A packet with a name.
type Named = (String, Vec<Vec<u8>>);

/// What is sent to the VIPs of one family.
struct Corpus {
    macs: [[u8; 6]; 2],
    vips: [Address; 2],
    client: Address,
    packets: Vec<Named>,
}

impl Corpus {
    fn framed(&self, mut frame: Vec<u8>) -> Vec<u8> {
        frame[..12].copy_from_slice(&self.macs.concat());
        frame
    }

    fn add(&mut self, name: String, packet: &Packet) {
        let frame = self.framed(packet.bytes());
        self.packets.push((name, vec![frame]));
    }

    /// All kinds of packets from a source that cannot be.
    fn from(&mut self, source: Address, what: &str) {
        let [vip, _] = self.vips;
        let at = |protocol, port, flags| Packet {
            flags,
            ttl: 64,
            payload: b"IBx".to_vec(),
            ..Packet::new(protocol, (source, port), (vip, port))
        };
        self.add(format!("datagram from {what}"), &at(UDP_NUMBER, ECHO, 0));
        let big = Packet { payload: vec![7; 1_400], ..at(UDP_NUMBER, ECHO, 0) };
        self.add(format!("long datagram from {what}"), &big);
        self.add(format!("SYN from {what}"), &Packet { payload: vec![], ..at(TCP, LINES, 0x02) });
        self.add(format!("segment from {what}"), &at(TCP, LINES, 0x10));
        self.add(format!("datagram to a closed port from {what}"), &at(UDP_NUMBER, 9, 0));
        let echo = self.icmp(source, if is_mapped(&vip) { 8 } else { 128 }, 0, &[0; 60]);
        self.packets.push((format!("echo request from {what}"), vec![echo]));
        // About a worker's answer to a client.
        let answer = Packet::new(UDP_NUMBER, (vip, ECHO), (self.client, 40_000)).ip();
        let (kind, code) = if is_mapped(&vip) { (3, 3) } else { (1, 4) };
        let error = self.icmp(source, kind, code, &[&[0; 4], &answer[..]].concat());
        self.packets.push((format!("ICMP error from {what}"), vec![error]));
        if is_mapped(&vip) {
            let parts = self.parts(&Packet { dont_fragment: false, ..big });
            self.packets.push((format!("datagram in parts from {what}"), parts));
        }
    }

    /// An ICMP message to the VIP.
    fn icmp(&self, source: Address, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
        let vip = self.vips[0];
        let mut message = [&[kind, code, 0, 0], rest].concat();
        let is_v4 = is_mapped(&vip);
        let mut summed = message.clone();
        if !is_v4 {
            let len = (message.len() as u32).to_be_bytes();
            summed.extend([&source[..], &vip[..], &len, &[0, 0, 0, 58]].concat());
        }
        message[2..4].copy_from_slice(&(!checksum(&summed)).to_be_bytes());
        let packet = Packet { payload: message, ttl: 64, ..Packet::new(UDP_NUMBER, (source, 0), (vip, 0)) };
        self.framed(packet.around(if is_v4 { 1 } else { 58 }))
    }

    /// An IPv4 packet in two parts.
    fn parts(&self, packet: &Packet) -> Vec<Vec<u8>> {
        let ip = packet.ip();
        let part = |from: usize, to: usize, more: bool| {
            let mut header = ip[..20].to_vec();
            header[2..4].copy_from_slice(&((20 + to - from) as u16).to_be_bytes());
            header[6..8].copy_from_slice(&((from / 8) as u16 | u16::from(more) << 13).to_be_bytes());
            header[10..12].fill(0);
            let check = (!checksum(&header)).to_be_bytes();
            header[10..12].copy_from_slice(&check);
            self.framed([packet.ethernet(), header, ip[20 + from..20 + to].to_vec()].concat())
        };
        vec![part(0, 800, true), part(800, ip.len() - 20, false)]
    }
}

fn corpus(stage: &Stage, is_v6: bool) -> Result<Vec<Named>> {
    let vip = |n| if is_v6 { address(vip_v6(n).into()) } else { address(vip_v4(n).into()) };
    let client = if is_v6 { CLIENT_V6.into() } else { CLIENT_V4.into() };
    let macs = [stage.bed.ingress.mac("eth0")?, stage.bed.client.mac("eth0")?];
    let (vips, client) = ([vip(1), vip(2)], address(client));
    let mut corpus = Corpus { macs, vips, client, packets: Vec::new() };
    corpus.from(vips[0], "the VIP itself");
    corpus.from(vips[1], "another VIP");
    let martians: &[&str] = if is_v6 {
        &["::", "::1", "ff02::1"]
    } else {
        &["127.0.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255"]
    };
    for text in martians {
        corpus.from(parse(text), text);
    }
    if stage.plan.mode == "nat" {
        // Addresses that workers see.
        for number in 1..=3 {
            let own = if is_v6 { format!("fd00:1:{number}::1") } else { format!("10.1.{number}.1") };
            for (port, protocol, flags) in
                [(ECHO, UDP_NUMBER, 0), (20_000, UDP_NUMBER, 0), (20_000, TCP, 0x02)]
            {
                let to = if protocol == TCP { LINES } else { ECHO };
                let packet = Packet { flags, ..Packet::new(protocol, (parse(&own), port), (vips[0], to)) };
                corpus.add(format!("{own}:{port} {protocol}"), &packet);
            }
        }
        for (name, flags) in [("reset", 0x04), ("FIN alone", 0x01), ("SYN and ACK", 0x12), ("no flags", 0)] {
            let packet = Packet { flags, ..Packet::new(TCP, (client, 40_000), (vips[0], LINES)) };
            corpus.add(format!("{name} of no flow"), &packet);
        }
        let spent = Packet { flags: 0x02, ttl: 1, ..Packet::new(TCP, (client, 40_001), (vips[0], LINES)) };
        corpus.add("SYN with TTL 1".to_owned(), &spent);
    }
    Ok(corpus.packets)
}

/// Packets that all links of the bed have carried, both ways, and what hosts have sent to themselves.
fn carried(stage: &Stage) -> Result<u64> {
    let bed = &stage.bed;
    let mut sum = 0;
    for namespace in bed.workers.iter().map(|w| &w.namespace).chain([&bed.client, &bed.ingress]) {
        // That of the reading thread, which is in the namespace.
        let text = namespace.enter(|| fs::read_to_string("/proc/thread-self/net/dev"))??;
        for line in text.lines().skip(2) {
            let (_, numbers) = line.split_once(':').context("an interface and its counters")?;
            sum += numbers.split_whitespace().nth(1).context("packets received")?.parse::<u64>()?;
        }
    }
    Ok(sum)
}

/// Waits until the bed carries next to nothing.
fn quiet(stage: &Stage) -> Result<()> {
    // What goes round does so without a pause.
    const LOOK: Duration = Duration::from_millis(50);
    let since = Instant::now();
    let mut before = carried(stage)?;
    loop {
        thread::sleep(LOOK);
        let now = carried(stage)?;
        if now - before <= 3 {
            return Ok(());
        }
        ensure!(since.elapsed() < Duration::from_secs(10), "the bed is not quiet: {} packets", now - before);
        before = now;
    }
}

/// The services once more without health checks, and another VIP beside the first.
fn configuration(stage: &Stage) -> String {
    let own = stage.configuration(&[0, 1, 2]);
    let mut text = String::new();
    let mut lines = own.lines().peekable();
    while let Some(line) = lines.next() {
        if line != "[service.health]" {
            text += &format!("{line}\n");
            continue;
        }
        while lines.next_if(|line| !line.starts_with('[')).is_some() {}
    }
    let other = text
        .replace(&format!("\"{}\"", vip_v4(1)), &format!("\"{}\"", vip_v4(2)))
        .replace(&format!("\"{}\"", vip_v6(1)), &format!("\"{}\"", vip_v6(2)))
        .replace("[[service]]\nname = \"", "[[service]]\nname = \"other-");
    text + &other
}

fn make_router(client: &Namespace) -> Result<()> {
    client.sysctl("ipv4/ip_forward", "1")?;
    client.sysctl("ipv6/conf/all/forwarding", "1")?;
    client.sysctl("ipv4/conf/all/send_redirects", "0")?;
    client.sysctl("ipv4/conf/eth0/send_redirects", "0")?;
    for name in ["all", "default", "eth0"] {
        client.sysctl(&format!("ipv4/conf/{name}/rp_filter"), "0")?;
    }
    Ok(())
}

fn carries_no_more(mode: &'static str) -> Result<()> {
    let layout = Layout { worker_mtu: 1_500, ..Layout::default() };
    let stage = Stage::start(Plan { mode, layout, offers: vec![LINE, UDP], ..Plan::default() })?;
    make_router(&stage.bed.client)?;
    stage.apply(&configuration(&stage))?;
    let answered = || -> Result<()> {
        for target in stage.targets(ECHO) {
            let answers = Flows::open(&stage.bed.client, target, 20)?.exchange()?;
            ensure!(answers.iter().all(Option::is_some), "{mode}: {target} does not answer: {answers:?}");
        }
        Ok(())
    };
    answered()?;
    let mut wrong = Vec::new();
    for is_v6 in [false, true] {
        for (name, frames) in corpus(&stage, is_v6)? {
            quiet(&stage).with_context(|| format!("before {name}; so far {wrong:?}"))?;
            let before = carried(&stage)?;
            let sent = COPIES * frames.len() as u64;
            let copies = std::iter::repeat_n(frames, COPIES as usize).flatten().collect();
            raw::send(&stage.bed.client, "eth0", copies, Duration::from_millis(1))?;
            thread::sleep(Duration::from_millis(50));
            let carried = carried(&stage)? - before;
            ensure!(carried >= sent, "{name}: {carried} packets of {sent} that were sent are not seen");
            if carried > 2 * sent + OWN {
                wrong.push(format!("{name}: {sent} sent, {carried} carried"));
                // What goes round goes round for ever: the next packets would be blamed for it.
                break;
            }
        }
    }
    ensure!(wrong.is_empty(), "{mode}: {wrong:#?}");
    answered()?;
    let stats = stage.lbctl.json(&["stats"])?;
    for reason in ["martian_source", "own_source"] {
        let all = stats["reasons"].as_array().context("stats list reasons")?;
        let count = all.iter().find(|r| r["reason"] == reason).and_then(|r| r["packets"].as_u64());
        ensure!(count.is_some_and(|n| n >= COPIES), "{mode}: {reason} is {count:?}");
    }
    // `explain` says the same.
    let at = format!("{}:{ECHO}", vip_v4(1));
    let own = format!("{}:{ECHO}", stage.bed.workers[0].v4);
    for (source, expected) in [
        (at.as_str(), "Source is a VIP"),
        (own.as_str(), "Source is a VIP"),
        ("127.0.0.1:5", "Invalid source address"),
    ] {
        let output = stage.lbctl.output(&["explain", source, &at, "udp"])?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(text.contains(expected) && output.status.code() == Some(1), "{text}");
    }
    Ok(())
}

#[test]
fn a_forged_packet_costs_no_more_than_two_by_nat() -> Result<()> {
    carries_no_more("nat")
}

#[test]
fn a_forged_packet_costs_no_more_than_two_by_ipip() -> Result<()> {
    carries_no_more("ipip")
}

#[test]
fn a_forged_packet_costs_no_more_than_two_by_gue() -> Result<()> {
    carries_no_more("gue")
}

#[test]
fn a_forged_packet_costs_no_more_than_two_by_l2() -> Result<()> {
    carries_no_more("l2")
}
