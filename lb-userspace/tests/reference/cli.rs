//! The pages of the command lines, from clap's definitions.

use super::text::{cell, code, head, split_default, table};
use clap::{Arg, Command};

/// Opening of lbctl's page.
pub const LBCTL: (&str, &str) = (
    "lbctl",
    "`lbctl` shows and changes a running `lbd` through its Unix socket. Each command also prints its help with `--help`.",
);
/// Opening of lbd's page.
pub const LBD: (&str, &str) = (
    "lbd",
    "`lbd` is the daemon. `lbd ingress` balances, `lbd worker` takes encapsulated packets on a backend. Every flag of \
     `lbd ingress` is also a key of `[lbd]`: see [settings](settings.md).",
);

/// Builds the page of a command and its subcommands.
pub fn page(mut command: Command, (title, about): (&str, &str)) -> String {
    command.build();
    let mut out = head(title, about);
    let globals: Vec<&Arg> = command.get_arguments().filter(|a| shown(a)).collect();
    if !globals.is_empty() {
        out.push_str("\n## Options of every command\n");
        out.push_str(&arguments(&globals));
    }
    if let Some(after) = command.get_after_help() {
        out.push_str(&after_help(&after.to_string()));
    }
    for below in command.get_subcommands() {
        write(&mut out, below, title);
    }
    out
}

fn shown(argument: &Arg) -> bool {
    !argument.is_hide_set() && !["help", "version"].contains(&argument.get_id().as_str())
}

fn write(out: &mut String, command: &Command, parent: &str) {
    if command.is_hide_set() || command.get_name() == "help" {
        return;
    }
    let name = format!("{parent} {}", command.get_name());
    let level = name.split(' ').count().min(4);
    out.push_str(&format!("\n{} {name}\n", "#".repeat(level)));
    let about = command.get_long_about().or_else(|| command.get_about());
    if let Some(about) = about {
        out.push_str(&format!("\n{}.\n", cell(about.to_string().trim_end_matches('.'))));
    }
    let aliases: Vec<_> = command.get_visible_aliases().map(|a| format!("`{a}`")).collect();
    if !aliases.is_empty() {
        out.push_str(&format!("\nAlso: {}.\n", aliases.join(", ")));
    }
    let below: Vec<_> = command.get_subcommands().filter(|c| c.get_name() != "help").collect();
    if below.is_empty() {
        let usage = command.clone().render_usage().to_string();
        out.push_str(&format!("\n```text\n{}\n```\n", usage.trim_start_matches("Usage: ").trim()));
        let own: Vec<&Arg> = command.get_arguments().filter(|a| shown(a) && !a.is_global_set()).collect();
        if !own.is_empty() {
            out.push_str(&arguments(&own));
        }
    }
    if let Some(after) = command.get_after_help() {
        out.push_str(&after_help(&after.to_string()));
    }
    for below in below {
        write(out, below, &name);
    }
}

/// Examples and exit codes, as the help prints them.
fn after_help(text: &str) -> String {
    format!("\n```text\n{}\n```\n", text.trim())
}

fn arguments(all: &[&Arg]) -> String {
    let rows: Vec<_> = all.iter().map(|a| row(a)).collect();
    table(&["argument", "default", "meaning"], &rows)
}

fn row(argument: &Arg) -> Vec<String> {
    let help = argument.get_long_help().or_else(|| argument.get_help());
    let (mut help, said) = split_default(&help.map(ToString::to_string).unwrap_or_default());
    let words: Vec<_> =
        argument.get_possible_values().iter().map(|v| format!("`{}`", v.get_name())).collect();
    if takes_value(argument) && !words.is_empty() {
        help.push_str(&format!(": {}", words.join(", ")));
    }
    if let Some(env) = argument.get_env() {
        help.push_str(&format!(" (environment: `{}`)", env.to_string_lossy()));
    }
    let given: Vec<_> =
        argument.get_default_values().iter().map(|v| v.to_string_lossy().into_owned()).collect();
    let default =
        said.unwrap_or_else(|| if takes_value(argument) { given.join(", ") } else { String::new() });
    vec![code(&name(argument)), code(&default), cell(&help)]
}

fn takes_value(argument: &Arg) -> bool {
    argument.is_positional() || argument.get_action().takes_values()
}

/// Formats an argument as it is typed: `-m, --message <TEXT>`, or `<NAME>`.
fn name(argument: &Arg) -> String {
    let values: Vec<_> = match argument.get_value_names() {
        Some(names) => names.iter().map(|n| format!("<{n}>")).collect(),
        None => vec![format!("<{}>", argument.get_id().as_str().to_uppercase())],
    };
    let more = if argument.get_num_args().is_some_and(|n| n.max_values() > 1) { "..." } else { "" };
    let values = values.join(" ") + more;
    let short = argument.get_short().map(|s| format!("-{s}"));
    let long = argument.get_long().map(|l| format!("--{l}"));
    let flags: Vec<_> = short.into_iter().chain(long).collect();
    match (flags.is_empty(), takes_value(argument)) {
        (true, _) => values,
        (false, true) => format!("{} {values}", flags.join(", ")),
        (false, false) => flags.join(", "),
    }
}
