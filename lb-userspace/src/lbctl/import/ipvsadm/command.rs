//! Options of a command of ipvsadm.

use super::super::{Unreadable, plural, script::ShellWord};
use std::collections::BTreeMap;

/// Options: short, long, and how many words follow; 9: at most one.
const OPTIONS: [(char, &str, u8); 47] = [
    ('A', "add-service", 0),
    ('E', "edit-service", 0),
    ('D', "delete-service", 0),
    ('C', "clear", 0),
    ('R', "restore", 0),
    ('S', "save", 0),
    ('a', "add-server", 0),
    ('e', "edit-server", 0),
    ('d', "delete-server", 0),
    ('L', "list", 0),
    ('l', "list", 0),
    ('Z', "zero", 0),
    ('h', "help", 0),
    ('t', "tcp-service", 1),
    ('u', "udp-service", 1),
    ('q', "sctp-service", 1),
    ('f', "fwmark-service", 1),
    ('s', "scheduler", 1),
    ('p', "persistent", 9),
    ('M', "netmask", 1),
    ('r', "real-server", 1),
    ('g', "gatewaying", 0),
    ('i', "ipip", 0),
    ('m', "masquerading", 0),
    ('w', "weight", 1),
    ('x', "u-threshold", 1),
    ('y', "l-threshold", 1),
    ('c', "connection", 0),
    ('n', "numeric", 0),
    ('o', "ops", 0),
    ('6', "ipv6", 0),
    ('b', "sched-flags", 1),
    ('\0', "set", 3),
    ('\0', "start-daemon", 1),
    ('\0', "stop-daemon", 1),
    ('\0', "tun-type", 1),
    ('\0', "tun-port", 1),
    ('\0', "tun-nocsum", 0),
    ('\0', "tun-csum", 0),
    ('\0', "tun-remcsum", 0),
    ('\0', "pe", 1),
    ('\0', "mcast-interface", 1),
    ('\0', "syncid", 1),
    ('\0', "sync-maxlen", 1),
    ('\0', "mcast-group", 1),
    ('\0', "mcast-port", 1),
    ('\0', "mcast-ttl", 1),
];
/// Options that only change what is printed.
const LISTING: [&str; 10] = [
    "stats",
    "rate",
    "exact",
    "thresholds",
    "persistent-conn",
    "sort",
    "nosort",
    "timeout",
    "daemon",
    "version",
];

/// One command: options by their long names, with their values.
#[derive(Default)]
pub(super) struct IpvsCommand {
    pub line: usize,
    pub options: BTreeMap<&'static str, Vec<ShellWord>>,
}

impl IpvsCommand {
    pub fn has(&self, option: &str) -> bool {
        self.options.contains_key(option)
    }

    pub fn value(&self, option: &str) -> Option<&ShellWord> {
        self.options.get(option)?.first()
    }

    pub fn text(&self, option: &str) -> Option<&str> {
        self.value(option).map(|w| w.text.as_str())
    }

    /// The service's option and its value, which name it in all commands.
    pub fn key(&self) -> Option<(&'static str, &ShellWord)> {
        ["tcp-service", "udp-service", "sctp-service", "fwmark-service"]
            .into_iter()
            .find_map(|option| Some((option, self.value(option)?)))
    }
}

/// Sorts the words of a command into options.
pub(super) fn parse(words: &[ShellWord]) -> Result<IpvsCommand, Unreadable> {
    let mut command = IpvsCommand { line: words.first().map_or(1, |w| w.at.0), ..IpvsCommand::default() };
    let mut words = words.iter().peekable();
    while let Some(word) = words.next() {
        let mut take = |name: &'static str, count: u8, attached: Option<&str>| {
            let mut values = Vec::new();
            values.extend(attached.map(|text| ShellWord { text: text.to_owned(), ..word.clone() }));
            if count == 9 && values.is_empty() {
                values.extend(words.next_if(|next| !next.text.starts_with('-')).cloned());
            }
            while count != 9 && values.len() < usize::from(count) {
                let Some(value) = words.next() else {
                    let expected = format!("{count} {}", plural(count.into(), "value", "values"));
                    return Err(Unreadable::new(
                        word.at,
                        format!("option {} ends the command", word.text),
                        expected,
                    ));
                };
                values.push(value.clone());
            }
            command.options.insert(name, values);
            Ok(())
        };
        let unknown = |text: &str| {
            let what = format!("{text} is not an option of ipvsadm");
            Err(Unreadable::new(word.at, what, "an option such as -A, -a, -t, -r (see ipvsadm(8))"))
        };
        if let Some(long) = word.text.strip_prefix("--") {
            let (name, attached) = long.split_once('=').map_or((long, None), |(n, v)| (n, Some(v)));
            let name = match name {
                "real" => "real-server",
                "tcp" => "tcp-service",
                "udp" => "udp-service",
                other => other,
            };
            match OPTIONS.iter().find(|(_, known, _)| *known == name) {
                Some((_, known, count)) => take(known, *count, attached)?,
                None if LISTING.contains(&name) => {}
                None => return unknown(&word.text),
            }
        } else if let Some(letters) = word.text.strip_prefix('-').filter(|letters| !letters.is_empty()) {
            for (at, letter) in letters.char_indices() {
                let Some((_, name, count)) = OPTIONS.iter().find(|(short, ..)| *short == letter) else {
                    if word.is_unknown {
                        break;
                    }
                    return unknown(&word.text);
                };
                let rest = &letters[at + letter.len_utf8()..];
                let attached = Some(rest).filter(|rest| !rest.is_empty() && *count > 0);
                // Of clustered letters such as -Ln, and of -pr, only values are the rest of the word.
                let attached =
                    attached.filter(|rest| *count != 9 || rest.starts_with(|c: char| c.is_ascii_digit()));
                take(name, *count, attached)?;
                if attached.is_some() {
                    break;
                }
            }
        } else if !word.is_unknown {
            let what = format!("{:?} belongs to no option", word.text);
            return Err(Unreadable::new(word.at, what, "an option such as -A, -a, -t, -r (see ipvsadm(8))"));
        }
    }
    Ok(command)
}
