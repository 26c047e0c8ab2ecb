//! Valid files, files with one mistake, and files with several.

use super::*;

fn problems(text: &str) -> Vec<String> {
    match File::parse(text) {
        Ok(_) => Vec::new(),
        Err(problems) => {
            Listing { file: "f", problems: &problems }.to_string().lines().map(str::to_owned).collect()
        }
    }
}

const GOOD: &str = r#"
[lbd]
iface = ["eth0", "eth1"]
max_services = 10
ipip_source = ["172.16.0.0/16"]
log_level = "debug"

[[service]]
name = "web"
vip = "10.0.0.1"
port = 80
protocol = "tcp"
mode = "gue"
drain_s = 60

[service.health]
kind = "http"
path = "/healthz"
interval_ms = 200

[service.replica]
kind = "custom"
port = 9100
metrics = { running = "busy", waiting = 'queued{kind="all"}' }

[service.regions]
policy = "weighted"
allowed = ["eu-1", "eu-2"]
weights = { eu-1 = 3 }

[service.rollout]
model = "m"
version = "v2"
permille = 50

[[service.backend]]
name = "a"
address = "10.1.0.1"
weight = 3
region = "eu-1"
zone = "z"

[[service.backend]]
name = "b"
address = "fd00::2"
state = "draining"

[[region]]
name = "eu-1"

[[region]]
name = "eu-2"
state = "draining"

[[service]]
name = "dns"
vip = "fd00::53"
port = "1000-2000"
protocol = "udp"
udp_stateless = true
seed = 7
"#;

#[test]
fn a_good_file_is_read_whole() {
    let file = File::parse(GOOD).unwrap();
    assert_eq!(file.options.iface, ["eth0", "eth1"]);
    assert_eq!(file.options.log_level, Some(LogLevel::Debug));
    let desired = file.desired.unwrap();
    let web = &desired.services[&"web".parse().unwrap()];
    assert_eq!((web.backends.len(), web.drain_s, web.health.interval_ms), (2, 60, 200));
    let replica = web.replica.as_ref().unwrap();
    assert_eq!(
        replica.metrics[&crate::desired::model::Quantity::Waiting].to_string(),
        "queued{kind=\"all\"}"
    );
}

#[test]
fn export_round_trips() {
    let desired = File::parse(GOOD).unwrap().desired.unwrap();
    let text = export(&desired);
    assert_eq!(File::parse(&text).unwrap().desired.unwrap(), desired, "{text}");
    assert!(!text.contains("scheduler"), "defaults are left out: {text}");
    assert_eq!(export(&File::parse(&text).unwrap().desired.unwrap()), text);
}

proptest::proptest! {
    #[test]
    fn whatever_is_exported_reads_back_as_it_was(state in crate::desired::model::generate::desired()) {
        let Desired { services, regions, guard: _ } = state;
        let wanted = Desired { services, regions, guard: Default::default() };
        let text = export(&wanted);
        // A seating and a table size that follow from the backends are left out, and computed again when the file is applied.
        let applied = |mut state: Desired| {
            state.assign_seats(&Desired::default());
            state.assign_sizes(&Desired::default());
            state
        };
        let found = File::parse(&text).map(|file| applied(file.desired.unwrap_or_default()));
        let wanted = applied(wanted);
        proptest::prop_assert_eq!(found.map_err(|problems| format!("{problems:?}")), Ok(wanted), "{}", text);
    }
}

proptest::proptest! {
    /// Hosts that share no store, and get their state from each other's exports, agree about every table that an earlier
    /// version made, whatever the other host had before.
    #[test]
    fn an_export_of_services_without_sizes_makes_the_same_tables_elsewhere(
        state in crate::desired::model::generate::desired(),
        before in crate::desired::model::generate::desired(),
    ) {
        let mut wanted = state;
        for service in wanted.services.values_mut() {
            std::sync::Arc::make_mut(service).table_size = None;
        }
        let mut named = wanted.clone();
        named.name_sizes();
        let text = export(&named);
        let mut found = File::parse(&text).unwrap().desired.unwrap_or_default();
        found.assign_sizes(&before);
        for (name, service) in &wanted.services {
            proptest::prop_assert_eq!(found.services[name].slots(), service.slots(), "{}: {}", name, text);
        }
    }
}

#[test]
fn a_file_without_services_is_not_one_with_none() {
    assert!(File::parse("[lbd]\niface = [\"e\"]").unwrap().desired.is_none());
    assert!(File::parse("service = []").unwrap().desired.unwrap().services.is_empty());
}

#[test]
fn each_mistake_has_its_place_and_fix() {
    let service = "[[service]]\nname = \"s\"\nvip = \"10.0.0.1\"\nport = 80\nprotocol = \"tcp\"\n";
    let cases = [
        ("[lbd]\nifaces = []\n".to_owned(), "f:2:1: unknown key ifaces in [lbd]; did you mean iface?"),
        ("[ldb]\n".to_owned(), "f:1:2: unknown key ldb in the file; did you mean lbd?"),
        ("[lbd]\nzzzzzzz = 1\n".to_owned(), "f:2:1: unknown key zzzzzzz in [lbd]; known keys: iface, "),
        (format!("{service}wieght = 1\n"), "f:6:1: unknown key wieght in [[service]]; known keys: "),
        (
            format!("{service}[service.health]\nkind = \"tcp\"\n  intervall_ms = 5\n"),
            "f:8:3: unknown key intervall_ms in [service.health]; did you mean interval_ms?",
        ),
        (
            format!("{service}replica = {{ kind = \"vllm\", prt = 5 }}\n"),
            "f:6:28: unknown key prt in [service.replica]; did you mean port?",
        ),
        (
            format!("{service}[service.replica]\nkind = \"vllm\"\nmetrics = {{ runing = \"a\" }}\n"),
            "f:8:13: unknown key runing in [service.replica.metrics]; did you mean running?",
        ),
        (
            format!("{service}replica = {{ kind = \"vllm\", metrics = {{ running = \"a b\" }} }}\n"),
            "f:6:50: replica: \"a b\" is not a valid metric",
        ),
        (
            format!("{service}replica = {{ kind = \"custom\" }}\n"),
            "f:6:20: service s: replica: kind is \"custom\", so metrics must name",
        ),
        (
            format!("{service}[[service.backend]]\nname = \"a\"\naddress = \"10.0.0.2\"\nwieght = 1\n"),
            "f:9:1: unknown key wieght in [[service.backend]]; did you mean weight?",
        ),
        (
            format!("{service}drain_s = \"1m\"\n"),
            "f:6:11: drain_s: found the text \"1m\", expected a whole number",
        ),
        (
            format!("{service}mode = \"ipp\"\n"),
            "f:6:8: mode: \"ipp\" is not one of ipip, gue, l2, nat, local; did you mean ipip?",
        ),
        (
            "[[service]]\nname = \"s\"\nvip = \"10.0.0\"\nport = 80\nprotocol = \"tcp\"\n".to_owned(),
            "f:3:7: vip: invalid IP address",
        ),
        (
            "[[service]]\nvip = \"10.0.0.1\"\nport = 80\nprotocol = \"tcp\"\n".to_owned(),
            "f:1:1: [[service]] has no name",
        ),
        (
            "[[service]]\nname = \"s\"\nport = 80\nprotocol = \"tcp\"\n".to_owned(),
            "f:1:1: [[service]] has no vip",
        ),
        (
            "[[service]]\nname = \"s\"\nvip = \"10.0.0.1\"\nport = \"x\"\nprotocol = \"tcp\"\n".to_owned(),
            "f:4:8: port: \"x\" is not a valid port",
        ),
        (
            "[[service]]\nname = \"s\"\nvip = \"10.0.0.1\"\nport = 0\nprotocol = \"tcp\"\n".to_owned(),
            "f:4:8: port: \"0\" is not a valid port",
        ),
        (
            "[[service]]\nname = \"s\"\nvip = \"10.0.0.1\"\nport = 70000\nprotocol = \"tcp\"\n".to_owned(),
            "f:4:8: port: ",
        ),
        ("[[service]]\nname = \"bad name\"\n".to_owned(), "f:2:8: name \"bad name\" is not valid"),
        ("[service]\nname = \"s\"\n".to_owned(), "f:1:1: several are possible: write [[service]]"),
        ("service = 3\n".to_owned(), "f:1:11: service must be the tables [[service]], found integer"),
        ("[[service]\n".to_owned(), "f:1:"),
        (format!("{service}{service}"), "f:7:8: a second service s; the first is in line 2"),
        (format!("{service}table_size = 100\n"), "f:6:14: service s: table_size 100 is not one of"),
        (
            format!("{service}[[service.backend]]\nname = \"a\"\naddress = \"10.0.0.1\"\n"),
            "f:8:11: backend s/a: address 10.0.0.1 is the service's own VIP",
        ),
        (
            format!("{service}[service.health]\nkind = \"tcp\"\npath = \"/\"\n"),
            "f:8:8: health: path is for kind \"http\" or \"https\" only",
        ),
    ];
    for (text, expected) in cases {
        let found = problems(&text);
        assert!(found.iter().any(|f| f.starts_with(expected)), "{text}\n{expected}\n{found:#?}");
    }
}

#[test]
fn all_mistakes_are_listed_at_once() {
    let text = "[lbd]\nprobes = \"x\"\nrevisions = false\n[[service]]\nname = \"s\"\nvip = 1\nprot = 80\nprotocol = \"sctp\"\n\
                [[service.backend]]\naddress = \"x\"\n[[service]]\nname = \"t\"\n";
    let found = problems(text);
    let lines: Vec<_> = found.iter().map(|f| f.split(':').nth(1).unwrap()).collect();
    assert_eq!(lines, ["2", "3", "6", "7", "8", "9", "10", "11"], "{found:#?}");
    let rules = problems(
        "[[service]]\nname = \"s\"\nvip = \"0.0.0.0\"\nport = 1\nprotocol = \"tcp\"\ntable_size = 5\n\
         [[service]]\nname = \"t\"\nvip = \"0.0.0.0\"\nport = 1\nprotocol = \"tcp\"\n",
    );
    assert_eq!(rules.len(), 4, "{rules:#?}");
}

#[test]
fn known_keys_are_those_that_serde_knows() {
    fn fields<T: serde::de::DeserializeOwned + std::fmt::Debug>(json: &str) -> Vec<String> {
        let error = serde_json::from_str::<T>(json).unwrap_err().to_string();
        let list = error.split("expected one of ").nth(1).unwrap_or_else(|| panic!("{error}"));
        let list = list.split(" at line").next().unwrap();
        list.split(", ").map(|f| f.trim_matches('`').to_owned()).collect()
    }
    let sorted = |mut list: Vec<String>| {
        list.sort();
        list
    };
    let known = |list: &[&str], without: &[&str], with: &[&str]| {
        let kept = list.iter().filter(|k| !without.contains(k)).chain(with);
        sorted(kept.map(|k| (*k).to_owned()).collect())
    };
    let bad = r#"{"?": 1}"#;
    assert_eq!(sorted(fields::<Options>(bad)), known(keys::LBD, &[], &[]));
    assert_eq!(
        sorted(fields::<crate::desired::model::Service>(bad)),
        known(keys::SERVICE, &["name", "backend"], &["backends"])
    );
    assert_eq!(sorted(fields::<crate::desired::model::HealthCheck>(bad)), known(keys::HEALTH, &[], &[]));
    assert_eq!(sorted(fields::<crate::desired::model::ReplicaSource>(bad)), known(keys::REPLICA, &[], &[]));
    let quantities = fields::<std::collections::BTreeMap<crate::desired::model::Quantity, u8>>(bad);
    assert_eq!(sorted(quantities), known(keys::METRICS, &[], &[]));
    assert_eq!(sorted(fields::<super::Hook>(bad)), known(keys::HOOK, &[], &[]));
    assert_eq!(sorted(fields::<crate::desired::model::Backend>(bad)), known(keys::BACKEND, &["name"], &[]));
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let flags = Options { iface: vec!["eth9".into()], max_flows: Some(5), ..Options::default() };
    let file =
        Options { iface: vec!["eth0".into()], max_flows: Some(6), max_slots: Some(7), ..Options::default() };
    let settings = flags.or(file).resolve().unwrap();
    assert_eq!((settings.iface, settings.max_flows, settings.max_slots), (vec!["eth9".to_owned()], 5, 7));
    assert_eq!(settings.max_services, lb_common::limits::SERVICES);
}

#[test]
fn settings_are_checked() {
    let with = |change: fn(&mut Options)| {
        let mut options = Options::default();
        change(&mut options);
        options.resolve().unwrap_err().to_string()
    };
    assert!(
        with(|o| o.socket_mode = Some("9".into()))
            .starts_with("socket_mode: \"9\" is not a valid octal mode")
    );
    assert!(with(|o| o.metrics = Some("x".into())).starts_with("metrics: \"x\" is neither"));
    assert!(with(|o| o.max_flows = Some(0)).starts_with("max_flows: 0 is too small"));
    assert!(with(|o| o.outer_ttl = Some(0)).starts_with("outer_ttl"));
    let two = with(|o| o.ipip_source = vec!["10.0.0.0/8".parse().unwrap(), "172.16.0.0/12".parse().unwrap()]);
    assert!(two.starts_with("ipip_source: 172.16.0.0/12 is a second prefix"));
    let unknown = with(|o| o.features = vec!["p2c".into(), "p3c".into()]);
    assert!(
        unknown.starts_with("features: \"p3c\" is not a feature: give all or none alone, or any of p2c, "),
        "{unknown}"
    );
}

#[test]
fn features_are_on_unless_named() {
    use lb_common::settings::features::{ALL, NAMES, P2C, QUIC};
    let bits = |named: &[&str]| {
        let features = named.iter().map(ToString::to_string).collect();
        Options { features, ..Options::default() }.resolve().unwrap().ingress.features
    };
    assert_eq!((bits(&[]), bits(&["all"]), bits(&["none"])), (ALL, ALL, 0));
    assert_eq!(bits(&["p2c", "quic"]), P2C | QUIC);
    assert_eq!(NAMES.iter().fold(0, |all, (_, bit)| all | bit), ALL);
}

#[test]
fn hooks_are_read_and_their_mistakes_are_found() {
    let file =
        File::parse("[[hook]]\non = [\"backend.down\", \"vip\"]\nrun = [\"/bin/mail\", \"ops\"]\n").unwrap();
    let hook = &file.hooks[0];
    assert_eq!((hook.on.len(), hook.run.len(), hook.timeout_s), (2, 2, 10));
    assert!(file.desired.is_none(), "hooks are settings of the daemon");
    let refused = |text: &str, at, words: &str| {
        let problems = File::parse(text).unwrap_err();
        assert!(problems[0].at == Some(at) && problems[0].what.contains(words), "{problems:?}");
    };
    let run = "run = [\"/bin/true\"]\n";
    refused(&format!("[[hook]]\non = [\"backend.dwn\"]\n{run}"), (2, 6), "did you mean backend.down?");
    refused(&format!("[[hook]]\non = []\n{run}"), (2, 6), "names no event");
    refused("[[hook]]\non = [\"vip\"]\nrun = [\"mail\"]\n", (3, 7), "not an absolute path");
    refused("[[hook]]\non = [\"vip\"]\nrun = []\n", (3, 7), "names no program");
    refused(&format!("[[hook]]\non = [\"vip\"]\n{run}timeout_s = 0\n"), (4, 13), "out of range: 1 to 3600");
    refused(&format!("[[hook]]\non = [\"vip\"]\n{run}timeout = 3\n"), (4, 1), "did you mean timeout_s?");
    refused(&format!("[[hook]]\n{run}"), (1, 1), "[[hook]] has no on");
    // The services have mistakes; the hooks are needed all the same.
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("lbd.toml");
    std::fs::write(&path, format!("[[hook]]\non = [\"vip\"]\n{run}[[service]]\nname = \"a\"\n")).unwrap();
    let (file, mistakes) = File::read_leniently(&path).unwrap();
    assert!(file.hooks.len() == 1 && mistakes.is_some());
}

#[test]
fn mistakes_are_told_at_their_key_and_in_plain_words() {
    let service = "[[service]]\nname = \"a\"\nvip = \"10.0.0.1\"\nport = 80\nprotocol = \"tcp\"\n";
    for (text, at, words) in [
        (
            format!("{service}drain_s = \"5m\"\n"),
            (6, 11),
            "drain_s: found the text \"5m\", expected a whole number",
        ),
        (format!("{service}drain_s = -1\n"), (6, 11), "drain_s: -1 is out of range: 0 to 4294967295"),
        ("[lbd]\niface = \"eth0\"\n".to_owned(), (2, 9), "iface: found the text \"eth0\", expected a list"),
        (format!("{service}mode = \"geu\"\n"), (6, 8), "did you mean gue?"),
        (
            format!("{service}[service.health]\nkind = \"http\"\npath = \"health\"\n"),
            (8, 8),
            "must start with '/'",
        ),
        (
            format!("{service}[service.replica]\nkind = \"stream\"\npath = \"state\"\n"),
            (8, 8),
            "must start with '/'",
        ),
        ("[[service]]\nname = \"a\n".to_owned(), (2, 10), "the text is not closed"),
    ] {
        let problems = File::parse(&text).unwrap_err();
        let problem = &problems[0];
        assert!(problem.at == Some(at) && problem.what.contains(words), "{text}\n{problems:#?}");
    }
}
