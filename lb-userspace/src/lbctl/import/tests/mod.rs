//! Small texts of each format; arbitrary texts.

mod proxies;

use super::*;
use crate::desired::{
    config::File,
    model::{BackendState, HealthKind, Ports, Scheduler, Service},
};

fn read_with(origin: Origin, text: &str, options: &ImportOptions) -> Imported {
    let imported = import(origin, text, options).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let toml = imported.to_toml(origin, "f");
    let file = File::parse(&toml).unwrap_or_else(|e| panic!("{e:?}\n{toml}"));
    assert_eq!(file.desired.unwrap_or_default().services, imported.desired.services, "{toml}");
    imported
}

fn read(origin: Origin, text: &str) -> Imported {
    read_with(origin, text, &ImportOptions::default())
}

fn vip(text: &str) -> ImportOptions {
    ImportOptions { vip: Some(text.parse().unwrap()), ..ImportOptions::default() }
}

fn service<'i>(imported: &'i Imported, name: &str) -> &'i Service {
    let known: Vec<_> = imported.desired.services.keys().map(ToString::to_string).collect();
    imported.desired.services.get(&name.parse().unwrap()).unwrap_or_else(|| panic!("{name}: {known:?}"))
}

/// What the notes say, with their lines.
fn says(imported: &Imported) -> Vec<String> {
    imported.notes.iter().map(|n| format!("{}: {}", n.line, n.says)).collect()
}

#[test]
fn ipvsadm_save_is_kept_whole() {
    let text = "-A -t 192.0.2.10:80 -s wlc\n-a -t 192.0.2.10:80 -r 10.1.0.11:80 -i -w 1\n\
                -a -t 192.0.2.10:80 -r 10.1.0.12:80 -i -w 0\n-A -u [2001:db8::1]:53 -s mh -b mh-port -o\n\
                -a -u [2001:db8::1]:53 -r [2001:db8::2]:53 -g -w 1\n-A -t 192.0.2.11:80 -s rr\n\
                -a -t 192.0.2.11:80 -r 10.1.0.11:8080 -m -w 1\n";
    let found = read(Origin::Ipvsadm, text);
    assert_eq!(says(&found), [""; 0]);
    let web = service(&found, "tcp-192.0.2.10-80");
    assert_eq!((web.mode, web.scheduler), (ForwardingMode::Ipip, Scheduler::Lc));
    let quiesced = &web.backends[&"10.1.0.12".parse().unwrap()];
    assert_eq!((quiesced.state, quiesced.weight), (BackendState::Draining, 1));
    let dns = service(&found, "udp-2001-db8--1-53");
    assert_eq!((dns.mode, dns.scheduler, dns.udp_stateless), (ForwardingMode::L2, Scheduler::Maglev, true));
    let nat = service(&found, "tcp-192.0.2.11-80");
    assert_eq!(
        (nat.mode, nat.backends[&"10.1.0.11".parse().unwrap()].port),
        (ForwardingMode::Nat, Some(8080))
    );
}

#[test]
fn ipvsadm_options_without_counterpart_are_notes() {
    let text = "ipvsadm --set 900 120 300\n\
                ipvsadm --add-service --tcp-service 192.0.2.10:0 --scheduler dh --persistent 600 --netmask 255.255.255.0\n\
                ipvsadm -a -t 192.0.2.10:0 -r 10.1.0.1 -g -x 100 -y 50\n\
                ipvsadm -a -t 192.0.2.10:0 -r 10.1.0.2:8080 -i\n\
                ipvsadm -A --sctp-service 192.0.2.10:80\nipvsadm -a --sctp-service 192.0.2.10:80 -r 10.1.0.1\n\
                ipvsadm -A -f 7\nipvsadm -A -t example.com:80\nipvsadm -A -t 192.0.2.9:http\n\
                ipvsadm --start-daemon master --mcast-interface eth0\n";
    let found = read(Origin::Ipvsadm, text);
    assert_eq!(
        says(&found),
        [
            "1: --set: 120 s for closed TCP connections",
            "2: scheduler dh",
            "2: persistence of 600 s",
            "2: netmask 255.255.255.0 of persistence",
            "3: --u-threshold",
            "3: --l-threshold",
            "4: a real server with another forwarding method",
            "4: server port 8080 for the service port any",
            "5: --sctp-service 192.0.2.10:80",
            "7: --fwmark-service 7",
            "8: --tcp-service example.com:80",
            "9: --tcp-service 192.0.2.9:http",
            "10: --start-daemon (synchronization of connections)",
        ]
    );
    let any = service(&found, "tcp-192.0.2.10-any");
    assert_eq!((any.port, any.scheduler, any.tcp_timeout_s), (Ports::Any, Scheduler::SourceHash, 900));
}

#[test]
fn ipvsadm_edits_and_removals_are_followed() {
    let text = "ipvsadm -A -t 192.0.2.1:1\nipvsadm -C\nipvsadm -A -t 192.0.2.1:2 -s rr\nipvsadm -E -t 192.0.2.1:2 -s wrr\n\
                ipvsadm -a -t 192.0.2.1:2 -r 10.1.0.1 -w 1; ipvsadm -a -t 192.0.2.1:2 -r 10.1.0.2\n\
                ipvsadm -e -t 192.0.2.1:2 -r 10.1.0.1 -w 9 && ipvsadm -d -t 192.0.2.1:2 -r 10.1.0.2\n\
                ipvsadm -A -t 192.0.2.1:3\nipvsadm -D -t 192.0.2.1:3\nipvsadm -Ln --stats\n";
    let found = read(Origin::Ipvsadm, text);
    assert_eq!((says(&found).len(), found.desired.services.len()), (0, 1), "{:?}", says(&found));
    let one = service(&found, "tcp-192.0.2.1-2");
    assert_eq!((one.scheduler, one.mode, one.backends.len()), (Scheduler::Wrr, ForwardingMode::L2, 1));
    assert_eq!(one.backends[&"10.1.0.1".parse().unwrap()].weight, 9);
}

#[test]
fn scripts_are_followed() {
    let text = "#!/bin/sh\nVIP=192.0.2.10 # the address\nexport PORT=80\nREALS=(10.1.0.1\n  10.1.0.2)\nIPVS=/sbin/ipvsadm\n\
                usage() {\n  cat <<END\nit's a usage of ipvsadm\nEND\n}\n\
                case \"$1\" in\nstart|restart)\n  $IPVS -C 2>/dev/null\n  ipvsadm -A -t ${VIP}:$PORT -s wlc\n\
                for r in ${REALS[@]} 10.1.0.3; do\n    ipvsadm -a -t $VIP:$PORT \\\n      -r $r -i\n  done\n\
                for n in $(seq 4 5); do ipvsadm -a -t $VIP:$PORT -r 10.1.0.$n -i >/dev/null; done\n  ;;\n\
                stop)\n  ipvsadm -C\n  ;;\nadd)\n  ipvsadm -a -t $2 -r $3\n  ;;\nesac\n[root@lb ~]# ipvsadm -A -u $VIP:53\nipvsadm -a -t $VIP:$PORT -r $(hostname -i) -i\n";
    let found = read(Origin::Ipvsadm, &text.replace("$IPVS -C", "$IPVSADM -C"));
    assert_eq!(service(&found, "tcp-192.0.2.10-80").backends.len(), 5);
    assert!(service(&found, "udp-192.0.2.10-53").backends.is_empty());
    let says = says(&found);
    assert!(
        says.len() == 2 && says[0].contains("the part add") && says[1].contains("$(hostname"),
        "{says:?}"
    );
}

#[test]
fn what_is_not_of_the_format_has_its_place() {
    for (origin, text, expected) in [
        (
            Origin::Ipvsadm,
            "ipvsadm -A -t 192.0.2.1:1 -k 5\n",
            "1:27: -k is not an option of ipvsadm; expected",
        ),
        (Origin::Ipvsadm, "ipvsadm -A -t\n", "1:12: option -t ends the command; expected 1 value"),
        (
            Origin::Ipvsadm,
            "x\nipvsadm -A -t 1.2.3:4\n",
            "2:15: \"1.2.3:4\" is not an address; expected ADDRESS:PORT",
        ),
        (Origin::Ipvsadm, "ipvsadm -A -t '1.2.3.4:5\n", "1:15: a quoted text that does not end"),
        (Origin::Ipvsadm, "hello\n", "1:1: the text has no command of ipvsadm; expected the output of"),
        (Origin::Ipvsadm, "  -> RemoteAddress:Port  Forward\n", "1:1: this is a listing of `ipvsadm -L`"),
        (
            Origin::Keepalived,
            "virtual_server 192.0.2.1 80 {\n",
            "1:1: the block virtual_server 192.0.2.1 80 does not end",
        ),
        (Origin::Keepalived, "a {\n}\n}\n", "3:1: a } that closes no block; expected a { before it"),
        (Origin::Keepalived, "{\n}\n", "1:1: a { without a keyword"),
        (Origin::Keepalived, "global_defs {\n router_id \"x\n}\n", "2:12: a quoted text that does not end"),
        (
            Origin::Keepalived,
            "virtual_server 1.2.3 80 {\n}\n",
            "1:1: \"1.2.3\" cannot be read; expected an IP address",
        ),
        (
            Origin::Keepalived,
            "real_server 10.0.0.1 80 {\n}\n",
            "1:1: real_server outside of a virtual_server",
        ),
        (Origin::Haproxy, "mode tcp\n", "1:1: \"mode\" before the first section; expected a section"),
        (Origin::Haproxy, "listen a\n bind :80\n server a\n", "3:2: a server without an address"),
        (
            Origin::Haproxy,
            "listen a\n bind 192.0.2.1\n server a 10.0.0.1\n",
            "2:2: \"192.0.2.1\" has no port",
        ),
        (Origin::Haproxy, "listen a\n log 'x\n", "2:6: a quoted text that does not end"),
        (Origin::Katran, "katran_goclient -A -t 1.2.3:4\n", "1:23: \"1.2.3:4\" is not an address"),
        (Origin::Katran, "katran_goclient -A -x\n", "1:20: \"-x\" is not an option"),
        (
            Origin::Katran,
            "VIP: x Port: 1 Protocol: tcp\n",
            "1:6: \"x\" cannot be read; expected the address of a VIP",
        ),
    ] {
        let options = vip("192.0.2.1");
        let error = import(origin, text, &options).map(|i| i.to_toml(origin, "f")).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{text}\n{error}");
    }
}

#[test]
fn katran_is_read() {
    let script = "./katran_goclient -A -t 192.0.2.1:80 -f NO_SPORT\nkatran_goclient -a -t 192.0.2.1:80 -r 10.0.0.1 -w 10\n\
                  katran_goclient -a -t 192.0.2.1:80 -r 10.0.0.2 -w 0\nkatran_goclient -A -u [2001:db8::1]:443 -f QUIC_VIP\n\
                  katran_goclient -E -u [2001:db8::1]:443 -f NO_LRU\nkatran_goclient -new_hc 10.0.0.1 -somark 1000\nkatran_goclient -l\n";
    let found = read(Origin::Katran, script);
    assert_eq!(says(&found), ["4: flag QUIC_VIP", "6: -new_hc (health check)"]);
    let one = service(&found, "tcp-192.0.2.1-80");
    assert_eq!(
        (one.scheduler, one.mode, one.backends.len()),
        (Scheduler::SourceHash, ForwardingMode::Ipip, 2)
    );
    assert_eq!(one.backends[&"10.0.0.2".parse().unwrap()].state, BackendState::Draining);
    assert!(service(&found, "udp-2001-db8--1-443").udp_stateless);
    let listing = "2024/05/19 13:49:34 vips len 1\nVIP:         192.0.2.1 Port:     80 Protocol: tcp\nVip's flags:  NO_SPORT \n \
                   ->10.0.0.1       weight: 10 flags: \n ->10.0.0.2       weight: 0 flags: \nexiting\n";
    let listed = read(Origin::Katran, listing);
    assert_eq!(service(&listed, "tcp-192.0.2.1-80"), one);
}

#[test]
fn what_breaks_a_rule_is_left_out_with_a_note() {
    let text = "-A -t 127.0.0.1:80\n-A -t 192.0.2.1:80\n-a -t 192.0.2.1:80 -r 192.0.2.1:80 -i\n\
                -a -t 192.0.2.1:80 -r 10.0.0.1:80 -i -w 70000\n-A -t 192.0.2.1:080\n";
    let found = read(Origin::Ipvsadm, text);
    let expected =
        ["1: service 127.0.0.1 80", "3: server 192.0.2.1", "4: weight 70000", "5: service 192.0.2.1 80"];
    assert_eq!(says(&found), expected);
    assert_eq!(found.desired.services.len(), 1);
}

#[test]
fn options_apply_to_all_services() {
    let options = ImportOptions {
        mode: Some(ForwardingMode::Gue),
        name_prefix: "eu-".to_owned(),
        ..ImportOptions::default()
    };
    let found =
        read_with(Origin::Ipvsadm, "-A -t 192.0.2.1:80\n-a -t 192.0.2.1:80 -r 10.0.0.1:8080 -m\n", &options);
    assert_eq!(service(&found, "eu-tcp-192.0.2.1-80").mode, ForwardingMode::Gue);
    assert_eq!(says(&found), ["2: server port 8080 for the service port 80"]);
}

/// Texts of the words of all formats, which reach more than arbitrary characters do.
fn texts() -> impl proptest::strategy::Strategy<Value = String> {
    use proptest::prelude::*;
    let words = [
        "ipvsadm",
        "-A",
        "-a",
        "-t",
        "-r",
        "-C",
        "$x",
        "x=1",
        "for",
        "in",
        "do",
        "done",
        "case",
        "esac",
        ";;",
        "start)",
        "(",
        ")",
        "{",
        "}",
        "\n",
        "\n",
        "\n",
        ";",
        "'",
        "\"",
        "\\",
        "192.0.2.1:80",
        "192.0.2.1",
        "80",
        "[::1]:0",
        "::",
        "-p",
        "virtual_server",
        "real_server",
        "group",
        "fwmark",
        "virtual_server_group",
        "192.0.2.1-255",
        "HTTP_GET",
        "url",
        "status_code",
        "200-299",
        "delay_loop",
        "1e308",
        "$x=",
        "@h",
        "listen",
        "defaults",
        "from",
        "frontend",
        "backend",
        "bind",
        "*:1-9",
        "server",
        "a",
        "check",
        "inter",
        "99999999999d",
        "option",
        "httpchk",
        "http-check",
        "expect",
        "rstatus",
        "^2",
        "balance",
        "default_backend",
        "katran_goclient",
        "VIP:",
        "Port:",
        "Protocol:",
        "tcp",
        "->",
        "weight:",
        "{1..9}",
        "$(seq",
        "<<EOF",
        "function",
        "f()",
        "#",
        "!",
    ];
    let known = prop::collection::vec(prop::sample::select(words.to_vec()), 0..60).prop_map(|w| w.join(" "));
    prop_oneof![known, any::<String>(), "[ -~\n\t]{0,200}"]
}

proptest::proptest! {
    /// Whatever the text, the result is valid or an error has a place.
    #[test]
    fn no_text_panics(text in texts(), has_vip in proptest::bool::ANY) {
        let options = if has_vip { vip("192.0.2.1") } else { ImportOptions::default() };
        for origin in [Origin::Ipvsadm, Origin::Keepalived, Origin::Haproxy, Origin::Katran] {
            match import(origin, &text, &options) {
                Ok(imported) => {
                    proptest::prop_assert!(imported.desired.check().is_empty());
                    let toml = imported.to_toml(origin, "f");
                    let read = File::parse(&toml).map(|f| f.desired.unwrap_or_default().services);
                    proptest::prop_assert_eq!(read.ok(), Some(imported.desired.services), "{}", toml);
                }
                Err(error) => proptest::prop_assert!(error.line > 0 && error.column > 0),
            }
        }
    }
}
