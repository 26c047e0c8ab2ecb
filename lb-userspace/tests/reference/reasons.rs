//! The drop reasons page: `lb_common::Reason`, and what to do about each.

use super::text::{cell, check_described, code, head, table};
use lb_common::{Reason, reason::Fate};

/// What to do when a counter grows; one line for every reason.
const ADVICE: &[(&str, &str)] = &[
    ("not_ip", "Nothing: ARP, LLDP and the like belong to the host."),
    ("truncated", "Look at the sender; the host's stack sees the packet unchanged."),
    ("bad_ipv4", "Look at the sender; the host's stack sees the packet unchanged."),
    ("bad_ipv6", "Look at the sender; the host's stack sees the packet unchanged."),
    ("too_many_vlans", "Remove a VLAN tag before this host; at most two are read."),
    ("bad_extension", "Look at the sender: long chains of IPv6 extension headers are unusual."),
    ("other_protocol", "Nothing: only TCP and UDP are balanced."),
    ("icmp", "Nothing: the host answers its own ICMP."),
    ("stage_missing", "Look at the log of `lbd`: a part of the program was not loaded. Restart `lbd`."),
    ("bad_transport", "Look at the sender; the host's stack sees the packet unchanged."),
    ("fragment", "Nothing: the packet is the host's own."),
    ("ipv6_off", "Set `ipv6 = true` in `[lbd]` if IPv6 services are wanted."),
    ("vlan_off", "Set `vlan = true` in `[lbd]` if tagged packets are to be balanced."),
    (
        "not_vip",
        "Nothing, if the traffic is for the host itself; otherwise compare the address with `lbctl service list`.",
    ),
    ("no_service", "Compare port and protocol with `lbctl service list`."),
    ("no_backend", "`lbctl backend list SERVICE`: weights, states and health."),
    ("no_backend_answered", "`lbctl backend list SERVICE`: weights, states and health."),
    ("broken_table", "Restart `lbd`, which writes the tables again, and report the log."),
    ("bad_family", "Give the backend an IPv6 address: IPv6 is not carried in IPv4."),
    ("bad_mode", "Restart `lbd`, which loads the program that matches its tables."),
    ("not_on_link", "Use mode `ipip` or `gue`, or put the worker on a segment of this host."),
    ("nat_no_port", "Add source addresses (`nat_source`) or ports (`nat_ports`)."),
    ("nat_no_room", "Raise `max_nat_flows`, and look for clients that open many connections."),
    (
        "nat_unknown",
        "Nothing after a start; if it grows for long, packets reach this host that another host has bound.",
    ),
    ("nat_reply", "Nothing: this counts normal work."),
    ("nat_reused", "Nothing: this counts normal work."),
    ("nat_gave_way", "A SYN flood, or `max_nat_flows` is too small: see `lbctl status`."),
    ("nat_completed", "Nothing: virtual interfaces leave checksums to a card."),
    (
        "nat_fragment",
        "Nothing, if the fragment is the host's own; otherwise lower the MTU of the workers' side so that answers are not fragmented.",
    ),
    ("nat_ttl", "Look for a routing loop, or a traceroute."),
    ("nat_error", "Nothing: this counts normal work."),
    ("too_big_answered", "Raise the MTU between ingress hosts and workers; `lbctl doctor` measures it."),
    ("too_big_dropped", "Raise that MTU, or `icmp_per_s`; clients did not get the answer."),
    ("fragment_forwarded", "Nothing: this counts normal work."),
    ("fragment_unknown", "Avoid fragments: the first part came later, or over another host."),
    ("fragment_overlap", "Look at the sender: overlapping fragments are an attack, or a broken stack."),
    ("fragment_tiny", "Look at the sender: such fragments are an attack."),
    ("fragment_bad", "Look at the sender: such fragments are an attack."),
    ("quic_routed", "Nothing: this counts normal work."),
    ("quic_unroutable", "Nothing: the first packets of a connection carry the client's own id."),
    ("quic_unknown_id", "Compare the server ids of the workers with `lbctl backend show`."),
    ("quic_short_id", "Compare the lengths in `quic` with the ids that the workers give out."),
    ("quic_truncated", "Look at the sender."),
    ("icmp_error_forwarded", "Nothing: path MTU discovery and unreachable messages reach the worker."),
    ("icmp_bad_quote", "Nothing, unless it grows fast: then somebody forges ICMP errors."),
    ("icmp_foreign_quote", "Somebody forges ICMP errors; nothing is affected."),
    ("echo_answered", "Nothing: this counts normal work."),
    ("echo_dropped", "Raise `icmp_per_s` if these pings are wanted."),
    ("no_route", "`ip route get BACKEND` on the ingress host."),
    (
        "no_neighbour",
        "`ip neigh` on the ingress host: does the backend, or the router to it, answer ARP or neighbour discovery?",
    ),
    ("no_egress", "Nothing, if the interface has just appeared; otherwise name it with `--iface`."),
    ("no_headroom", "Report it with the driver's name and kernel version; mode `l2` adds no headers."),
    ("fib_lookup", "See why the next hop is not resolved: `lbctl backend show SERVICE BACKEND`."),
    ("flow_not_recorded", "Raise `max_flows`."),
    ("flow_promoted", "Nothing: this counts normal work."),
    ("flow_stale", "Nothing: the backend was removed while the flow was still tracked."),
    ("taken_over", "Nothing: it ends when the upgrade is complete."),
    ("decap_ipip", "Nothing: this counts normal work."),
    ("decap_gue", "Nothing: this counts normal work."),
    ("decap_not_ours", "Compare `--address` of `lbd worker` with the backend's address."),
    ("decap_not_vip", "Add the VIP to `--vip` of `lbd worker`."),
    ("decap_bad_inner", "Look at the sender: only ingress hosts should reach the worker's tunnel."),
    (
        "decap_bad_gue",
        "Upgrade `lbd worker` before the ingress hosts, and let only ingress hosts reach the GUE port.",
    ),
    ("decap_fragment", "Raise the MTU between ingress host and worker."),
    ("decap_ttl", "Look for a routing loop, or raise `outer_ttl`."),
    ("decap_ecn", "Nothing, unless it grows fast: a router marks packets that do not support ECN."),
    ("decap_cookie", "A SYN flood, or a listener with a short queue: see `ss -ltn` on the worker."),
    ("decap_adjust", "Report it with the driver's name and kernel version."),
    ("chance_first", "Nothing: this counts normal work."),
    ("chance_second", "Nothing: second chance found the flow."),
    ("chance_third", "Nothing: second chance found the flow."),
    ("chance_none", "Nothing, unless it grows fast: packets of connections that no worker has."),
    ("chance_sent_on", "Nothing: second chance passed the packet on."),
    ("chance_bad", "Upgrade all workers to one version, and let only ingress hosts reach the GUE port."),
    ("chance_loop", "Let only ingress hosts and workers reach the GUE port: such packets are forged."),
    ("guard_denied", "`lbctl guard check CLIENT` names the entry."),
    ("rate_service", "Raise `new_flow_rate` if these clients are wanted: `lbctl service show SERVICE`."),
    ("rate_source", "Raise `source_rate` if these clients are wanted: `lbctl service show SERVICE`."),
    ("flow_flood", "`lbctl status` names the service: a flood, or `max_flows` is too small."),
    (
        "residency",
        "`lbctl policy explain SERVICE`: the allowed regions, and the backends that are left there.",
    ),
    ("martian_source", "Look for who sends from such addresses; routers should drop them (BCP 38)."),
    (
        "own_source",
        "Look for a host that uses a VIP as its source, or for forged packets; no answer goes back to a VIP.",
    ),
    ("nat_stray", "Nothing, unless it grows fast: packets of flows that are over, or a scan."),
    (
        "syn_evicted",
        "Nothing, unless it is more than a thousandth of the new flows: look for a SYN flood, and limit new flows per source.",
    ),
];

/// Builds the page.
pub fn page() -> String {
    let labels: Vec<&str> = Reason::ALL.iter().map(|reason| reason.label()).collect();
    let described: Vec<&str> = ADVICE.iter().map(|(label, _)| *label).collect();
    check_described(&labels, &described, "reasons.rs");

    let mut out = head(
        "Drop reasons",
        "Every packet that is not simply forwarded is counted under one reason. `lbctl stats` shows the counters, \
         `lb_dataplane_packets_total` exports them, on workers `lb_worker_packets_total`.",
    );
    let sections = [
        (Fate::Drop, "Dropped", "The packet ends here."),
        (Fate::Answer, "Answered", "The packet is answered to its sender, and not forwarded."),
        (Fate::Pass, "Passed to the host", "The packet goes unchanged to the network stack of this host."),
        (Fate::Note, "Noted", "The packet is forwarded or delivered; the counter says how."),
    ];
    for (fate, title, about) in sections {
        out.push_str(&format!("\n## {title}\n\n{about}\n"));
        let ours = Reason::ALL.iter().filter(|reason| reason.fate() == fate);
        let rows: Vec<_> = ours
            .map(|reason| {
                let what = advice(reason.label()).expect("checked above");
                vec![code(reason.label()), cell(reason.describe()), cell(what)]
            })
            .collect();
        out.push_str(&table(&["reason", "meaning", "what to do"], &rows));
    }
    out
}

fn advice(label: &str) -> Option<&'static str> {
    ADVICE.iter().find(|(known, _)| *known == label).map(|(_, what)| *what)
}
