//! The settings page: every key of the configuration file, with flags and environment variables.

use super::{
    keys::{Key, TABLES, TOP, Table},
    text::{cell, code, head, split_default, table},
};
use clap::{Arg, CommandFactory, Parser};
use lb_userspace::{
    desired::{
        config::{Settings, keys},
        model::{Backend, HealthCheck, Region, RegionRules, ReplicaSource, Rollout, Service},
    },
    lbd::args::{LbdArgs, LbdCommand},
};
use serde_json::{Value, json};

/// Builds the page.
pub fn page() -> String {
    let mut out = head(
        "Settings",
        "The configuration file is TOML. `lbctl config check FILE` finds every mistake in it without a daemon. \
         `[lbd]` holds settings of the daemon; each of them is also a flag of `lbd ingress` and an environment \
         variable. A flag wins over the environment, the environment over the file, the file over the default. A \
         change in `[lbd]` takes effect when `lbd` restarts, which loses no packet. `[[service]]` and `[[region]]` \
         are desired state, and take effect with `lbctl config apply FILE` or `systemctl reload lbd`.",
    );
    section(&mut out, &TOP);
    out.push_str(
        "\n## [lbd]\n\nSettings of the daemon. The `max_*` keys are sizes of maps and stay as they are while the maps are \
         pinned: to change them, stop `lbd`, run `lbd detach` and start it again.\n",
    );
    out.push_str(&table(&["key", "type", "default", "meaning", "flag, environment"], &daemon_rows()));
    for part in TABLES {
        section(&mut out, part);
    }
    out
}

fn section(out: &mut String, part: &Table) {
    out.push_str(&format!("\n## {}\n\n{}\n", part.title, part.about));
    let described: Vec<&str> = part.keys.iter().map(|key| key.0).collect();
    assert_eq!(
        described, part.known,
        "{}: tests/reference/keys.rs must describe the keys of config/keys.rs, in their order",
        part.title
    );
    let row = |(name, kind, default, text): &Key| {
        let default = if default.is_empty() { "**required**".to_owned() } else { cell(default) };
        vec![code(name), cell(kind), default, cell(text)]
    };
    let rows: Vec<_> = part.keys.iter().map(row).collect();
    out.push_str(&table(&["key", "type", "default", "meaning"], &rows));
}

/// Rows of `[lbd]`, from the definition of the flags.
fn daemon_rows() -> Vec<Vec<String>> {
    let ingress = LbdArgs::command();
    let ingress = ingress.find_subcommand("ingress").unwrap();
    let row = |key: &&str| {
        let argument = ingress.get_arguments().find(|a| a.get_id().as_str() == *key);
        let argument = argument.unwrap_or_else(|| panic!("[lbd] {key} has no flag of `lbd ingress`"));
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        assert!(!help.is_empty(), "--{key} has no help text");
        let (help, default) = split_default(&help);
        let default = default.unwrap_or_else(|| implicit_default(argument).to_owned());
        let flag = format!("--{}", argument.get_long().expect("settings are long flags"));
        let env = argument.get_env().expect("settings have variables").to_string_lossy();
        vec![
            code(key),
            kind(argument),
            cell(&default),
            cell(&help),
            format!("{}, {}", code(&flag), code(&env)),
        ]
    };
    keys::LBD.iter().map(row).collect()
}

/// Default of a flag without a default in its help: a switch is off, another value is absent.
fn implicit_default(argument: &Arg) -> &'static str {
    if is_switch(argument) { "false" } else { "none" }
}

fn is_switch(argument: &Arg) -> bool {
    argument.get_value_names().is_some_and(|names| names[0] == "BOOL")
}

/// The type of a setting in the file.
fn kind(argument: &Arg) -> String {
    let words: Vec<_> = argument.get_possible_values().iter().map(|v| code(v.get_name())).collect();
    let name = argument.get_value_names().map(|names| names[0].as_str()).unwrap_or_default();
    let one = match name {
        "N" => "integer".to_owned(),
        "BOOL" => "boolean".to_owned(),
        "IFACE" => "interface name".to_owned(),
        "DIR" | "FILE" | "PATH" => "path".to_owned(),
        "NET" => "prefix".to_owned(),
        _ if !words.is_empty() => words.join(", "),
        other => format!("string, {}", code(other)),
    };
    if argument.get_value_delimiter().is_some() { format!("array of: {one}") } else { one }
}

/// Values of absent keys, for keys with a default value.
fn defaults(title: &str) -> Value {
    let service = json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp"});
    fn read<T: serde::de::DeserializeOwned + serde::Serialize>(least: Value) -> Value {
        serde_json::to_value(serde_json::from_value::<T>(least).unwrap()).unwrap()
    }
    match title {
        "[[service]]" => read::<Service>(service),
        "[[service.backend]]" => read::<Backend>(json!({"address": "10.1.0.1"})),
        "[service.health]" => read::<HealthCheck>(json!({"kind": "http"})),
        "[service.replica]" => read::<ReplicaSource>(json!({"kind": "vllm"})),
        "[service.regions]" => read::<RegionRules>(json!({})),
        "[service.rollout]" => read::<Rollout>(json!({"model": "m", "version": "v", "permille": 5})),
        "[[region]]" => read::<Region>(json!({})),
        _ => json!({}),
    }
}

/// Numbers and words that the tables give as defaults equal those of the code.
#[test]
fn defaults_are_those_of_the_code() {
    let mut compared = 0;
    for part in TABLES {
        let Value::Object(code) = defaults(part.title) else { panic!("{}: no table", part.title) };
        for (key, _, default, _) in part.keys.iter().filter(|key| !key.2.is_empty()) {
            let shown = match code.get(*key) {
                Some(Value::String(text)) if !text.is_empty() => text.clone(),
                Some(number @ (Value::Number(_) | Value::Bool(_))) => number.to_string(),
                _ => continue,
            };
            assert_eq!(shown, *default, "{} {key}", part.title);
            compared += 1;
        }
    }
    assert!(compared >= 20, "only {compared} defaults were compared");
}

/// The parser's key lists equal the fields that serde accepts, for tables without another such test.
#[test]
fn the_parser_knows_what_serde_knows() {
    fn fields<T: serde::de::DeserializeOwned + std::fmt::Debug>(without: &str) -> Vec<String> {
        let error = serde_json::from_value::<T>(json!({"?": 1})).unwrap_err().to_string();
        let (_, list) = error.split_once("expected").unwrap_or_else(|| panic!("{error}"));
        let mut names: Vec<String> = list.split('`').skip(1).step_by(2).map(str::to_owned).collect();
        names.push(without.to_owned());
        names.retain(|name| !name.is_empty());
        names.sort();
        names
    }
    let sorted = |list: &[&str]| {
        let mut list: Vec<String> = list.iter().map(|k| (*k).to_owned()).collect();
        list.sort();
        list
    };
    assert_eq!(fields::<RegionRules>(""), sorted(keys::REGIONS));
    assert_eq!(fields::<Rollout>(""), sorted(keys::ROLLOUT));
    assert_eq!(fields::<Region>("name"), sorted(keys::REGION));
}

fn resolve(arguments: &[String]) -> Settings {
    let given = ["lbd", "ingress", "--iface", "eth0"].map(str::to_owned);
    let cli = LbdArgs::try_parse_from(given.iter().chain(arguments)).unwrap_or_else(|e| panic!("{e}"));
    let LbdCommand::Ingress(ingress) = cli.command else { panic!("not ingress") };
    let mut settings = ingress.options.resolve().unwrap_or_else(|e| panic!("{arguments:?}: {e}"));
    // These only record that the value was set explicitly.
    (settings.metrics_required, settings.nat_ports_required) = (false, false);
    settings
}

/// Setting a flag to the default in its help does not change the settings.
#[test]
fn flags_without_effect_are_their_defaults() {
    let ingress = LbdArgs::command();
    let ingress = ingress.find_subcommand("ingress").unwrap();
    let plain = resolve(&[]);
    let mut compared = 0;
    for argument in ingress.get_arguments() {
        let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
        let Some(default) =
            split_default(&help).1.or_else(|| is_switch(argument).then(|| "false".to_owned()))
        else {
            continue;
        };
        // A default in words, or taken from the host's name, is not a value of the flag.
        if default.contains(' ') || default.contains('\'') {
            continue;
        }
        let flag = format!("--{}", argument.get_long().unwrap());
        assert_eq!(resolve(&[flag.clone(), default.clone()]), plain, "{flag} {default}");
        compared += 1;
    }
    assert!(compared >= 20, "only {compared} defaults were compared");
}
