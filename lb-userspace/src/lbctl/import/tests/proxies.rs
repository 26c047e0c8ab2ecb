//! keepalived and HAProxy.

use super::*;

const KEEPALIVED: &str = r#"
! comment
global_defs {
    router_id LVS   # comment
}
$BACKEND=10.1.0
vrrp_script chk { script "/bin/true { x" }
vrrp_instance VI_1
{
    virtual_ipaddress { 192.0.2.10 }
}
vrrp_instance VI_2 {
}
include /etc/keepalived/conf.d/*.conf
virtual_server_group web {
    192.0.2.10 80
    192.0.2.20-21 8080
    fwmark 3
}
virtual_server group web {
    delay_loop 2
    lb_algo wlc
    lb_kind TUN type gue port 5555
    protocol TCP
    persistence_timeout 300
    quorum 2
    virtualhost www.example.com
    sorry_server 10.1.0.99 80
    real_server ${BACKEND}.11 80 {
        weight 3
        inhibit_on_failure
        notify_down "/bin/mail me"
        HTTP_GET {
            url {
                path /healthz
                status_code 200 204
                digest 640205b7b0fc66c1ea91c463fac6334d
            }
            connect_timeout 1.5
            retry 2
            delay_before_retry 1
        }
    }
    real_server $BACKEND.12 80 {
        weight 0
        SSL_GET {
            url {
                path /
            }
        }
    }
}
virtual_server 2001:db8::53 53 {
    lb_algo rr
    lb_kind DR
    ops
    protocol UDP
    @main delay_loop 3
    real_server 2001:db8:1::1 53 {
        MISC_CHECK {
            misc_path "/bin/check dns"
        }
    }
}
virtual_server 192.0.2.30 443 {
    protocol SCTP
}
"#;

#[test]
fn keepalived_is_read() {
    let found = read(Origin::Keepalived, KEEPALIVED);
    let expected = [
        "3: global_defs",
        "7: vrrp_script",
        "8: vrrp_instance",
        "14: include /etc/keepalived/conf.d/*.conf",
        "18: fwmark 3",
        "25: persistence of 300 s",
        "26: quorum 2",
        "28: sorry_server",
        "29: server port 80 for the service port 8080",
        "32: notify_down",
        "36: status_code 200 204",
        "37: digest",
        "41: delay_before_retry",
        "44: a health check that differs from that of the other servers",
        "56: one-packet scheduling with this scheduler",
        "58: @main (a line for some hosts)",
        "60: MISC_CHECK",
        "66: protocol SCTP",
    ];
    assert_eq!(says(&found), expected);
    assert_eq!(found.notes[2].more_lines, [12]);
    assert_eq!(found.desired.services.len(), 4);
    let web = service(&found, "web-192.0.2.21-8080");
    assert_eq!((web.mode, web.gue_port, web.scheduler), (ForwardingMode::Gue, 5555, Scheduler::SourceHash));
    let health = &web.health;
    assert_eq!((health.interval_ms, health.timeout_ms, health.rise, health.fall), (2_000, 1_500, 1, 3));
    let HealthKind::Http(http) = &health.kind else { panic!("{health:?}") };
    assert_eq!((http.path.as_str(), http.status), ("/healthz", (200, 204)));
    assert_eq!(http.host.as_deref(), Some("www.example.com"));
    assert_eq!(web.backends[&"10.1.0.12".parse().unwrap()].state, BackendState::Draining);
    assert!(service(&found, "udp-2001-db8--53-53").udp_stateless);
    assert_eq!(read_with(Origin::Keepalived, KEEPALIVED, &vip("192.0.2.99")).desired.services.len(), 5);
}

#[test]
fn keepalived_checks_are_kept() {
    let of = |checker: &str, server: &str| {
        let text = format!(
            "virtual_server 192.0.2.1 {server} {{\n delay_loop 6\n lb_kind NAT\n real_server 10.0.0.1 80 {{\n{checker}\n}}\n}}\n"
        );
        let found = read(Origin::Keepalived, &text);
        let first = found.desired.services.values().next().unwrap();
        (first.health.clone(), says(&found), text)
    };
    let (tcp, notes, text) = of("TCP_CHECK {\nconnect_timeout 3\nconnect_port 81\n}", "80");
    assert_eq!(
        (tcp.kind, tcp.port, tcp.timeout_ms, tcp.fall, notes.len()),
        (HealthKind::Tcp, Some(81), 3_000, 2, 0),
        "{text}"
    );
    let (ssl, notes, _) = of("SSL_GET {\nurl {\npath /a\nregex ready\n}\n}", "80");
    let HealthKind::Http(http) = ssl.kind else { panic!() };
    assert_eq!(
        (http.tls.map(|t| t.verify), http.body.as_deref(), notes.len()),
        (Some(false), Some("ready"), 0)
    );
    // The worker's own port is checked, which mode nat has.
    let (other, notes, _) = of("TCP_CHECK {\n}", "8080");
    assert_eq!((other.port, other.interval_ms, notes.len()), (None, 6_000, 0));
    let (any, notes, _) = of("TCP_CHECK {\n}", "0");
    assert_eq!(any.port, Some(80));
    assert!(notes[0].contains("server port 80 for the service ports any"), "{notes:?}");
    for checker in ["DNS_CHECK", "UDP_CHECK", "PING_CHECK", "MISC_CHECK", "SMTP_CHECK"] {
        let (_, notes, _) = of(&format!("{checker} {{\n}}"), "80");
        assert_eq!(notes, [format!("5: {checker}")]);
    }
}

const HAPROXY: &str = r#"
global
    log /dev/log local0
    setenv BACKEND 10.1.0.11
defaults base
    mode tcp
    timeout connect 5s
    timeout check 700ms
    default-server inter 1s
listen chat
    bind 192.0.2.10:443,192.0.2.11:443
    balance leastconn
    option httpchk GET /healthz
    http-check send hdr Host www.example.com
    server gpu-1 "${BACKEND}":443 check rise 2 fall 3 weight 100
    server gpu-2 10.1.0.12:443 check weight 200 slowstart 30s
    server gpu-3 10.1.0.13:443 check weight 0
    server gpu-4 10.1.0.14:443 check disabled
    server spare 10.1.0.15:443 check backup
frontend one
    bind 192.0.2.20:80
    bind 192.0.2.20:90
    default_backend shared
frontend two
    bind *:8000-8010
    bind unix@/run/x.sock
    use_backend other if { src 10.0.0.0/8 }
    default_backend shared
backend shared
    balance source
    stick-table type ip size 1m
    server a 10.2.0.1:8080 send-proxy-v2
    server b example.com:8080
    server-template w 3 example.com:80
backend other
    server c 10.3.0.1:80
frontend web from base
    mode http
    bind 192.0.2.30:443 ssl crt /etc/x.pem
    default_backend pages
backend pages
    mode http
    server d 10.4.0.1:443
frontend app
    mode http
    bind 192.0.2.40:80
    http-request redirect scheme https
    default_backend pages
listen stats
    mode http
    bind 192.0.2.50:9000
    stats enable
"#;

#[test]
fn haproxy_is_read() {
    let found = read_with(Origin::Haproxy, HAPROXY, &vip("192.0.2.99"));
    let names: Vec<_> = found.desired.services.keys().map(ToString::to_string).collect();
    let expected = [
        "chat-192.0.2.10-443",
        "chat-192.0.2.11-443",
        "one-192.0.2.20-80",
        "one-192.0.2.20-90",
        "two",
        "web",
    ];
    assert_eq!(names, expected);
    let chat = service(&found, "chat-192.0.2.10-443");
    assert_eq!((chat.scheduler, chat.slow_start_s, chat.mode), (Scheduler::Lc, 30, ForwardingMode::Ipip));
    assert_eq!((chat.health.interval_ms, chat.health.timeout_ms), (1_000, 700));
    let HealthKind::Http(http) = &chat.health.kind else { panic!() };
    assert_eq!(
        (http.path.as_str(), http.status, http.host.as_deref()),
        ("/healthz", (200, 399), Some("www.example.com"))
    );
    let state = |name: &str| chat.backends[&name.parse().unwrap()].state;
    assert_eq!(
        (state("gpu-1"), state("gpu-3"), state("gpu-4")),
        (BackendState::Up, BackendState::Draining, BackendState::Down)
    );
    let one = service(&found, "one-192.0.2.20-80");
    assert_eq!((one.mode, one.backends[&"a".parse().unwrap()].port), (ForwardingMode::Nat, Some(8080)));
    assert_eq!(service(&found, "two").port, Ports::Range(8000, 8010));
    let says = says(&found).join("\n");
    for expected in [
        "2: section global",
        "19: server spare: backup",
        "26: bind unix@/run/x.sock",
        "27: use_backend other if { src 10.0.0.0/8 }",
        "31: stick-table",
        "32: server: send-proxy-v2",
        "32: server port 8080 for the service port 8000-8010",
        "33: server at example.com:8080",
        "34: server-template w",
        "35: backend other",
        "37: frontend web: mode http",
        "39: bind: ssl",
        "44: frontend app: mode http",
        "49: listen stats",
    ] {
        assert!(says.contains(expected), "{expected}\n{says}");
    }
}

#[test]
fn haproxy_checks_are_kept() {
    let of = |lines: &str, options: &str| {
        let text =
            format!("listen a\n bind 192.0.2.1:443\n{lines}\n server a 10.0.0.1:443 check {options}\n");
        let found = read(Origin::Haproxy, &text);
        (service(&found, "a").health.clone(), says(&found))
    };
    let (plain, notes) = of("", "");
    assert_eq!(
        (plain.kind, plain.interval_ms, plain.rise, plain.fall, notes.len()),
        (HealthKind::Tcp, 2_000, 2, 3, 0)
    );
    let (old, notes) = of(r" option httpchk GET /up HTTP/1.1\r\nHost:\ a.example", "port 8080");
    let HealthKind::Http(http) = old.kind else { panic!() };
    assert_eq!(
        (http.path.as_str(), http.host.as_deref(), old.port, notes.len()),
        ("/up", Some("a.example"), Some(8080), 0)
    );
    let (new, notes) = of(
        " option httpchk\n http-check send meth HEAD uri /up\n http-check expect status 200-204",
        "ssl verify none",
    );
    let HealthKind::Http(http) = new.kind else { panic!() };
    assert_eq!((http.status, http.tls.map(|t| t.verify)), ((200, 204), Some(false)));
    assert!(notes.iter().any(|n| n.contains("the method HEAD")), "{notes:?}");
    assert_eq!(of(" option ssl-hello-chk", "").0.kind.label(), "tls");
    let (script, notes) = of(" option tcp-check\n tcp-check send PING\n tcp-check expect string PONG", "");
    assert_eq!((script.kind.label(), notes.len()), ("tcp", 2));
}
