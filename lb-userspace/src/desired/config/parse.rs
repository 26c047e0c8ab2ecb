//! Parses a [`File`], collecting problems instead of stopping at the first.

use super::{ConfigProblem, File, Hook, Options, keys, nearest, words};
use crate::desired::model::{Backend, Desired, Name, Region, Service, Subject};
use serde::de::DeserializeOwned;
use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
};
use toml::{
    Spanned,
    de::{DeTable, DeValue, ValueDeserializer},
};

/// Implements [`File::parse`].
pub fn parse(text: &str) -> Result<File, Vec<ConfigProblem>> {
    let mut parser = Parser { lines: line_starts(text), text, problems: Vec::new() };
    let (table, errors) = DeTable::parse_recoverable(text);
    // Only the first: after a missing bracket, further errors are meaningless.
    if let Some(error) = errors.first() {
        parser.problem(error.span(), words::syntax(error.message()));
        return Err(parser.finish());
    }
    let file = parser.file(table.into_inner());
    if parser.problems.is_empty() { Ok(file) } else { Err(parser.finish()) }
}

/// Reads `[lbd]` and `[[hook]]` alone, where the services have mistakes; none if there are mistakes elsewhere.
pub fn parse_settings(text: &str) -> Option<File> {
    let mut parser = Parser { lines: line_starts(text), text, problems: Vec::new() };
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut table = table.into_inner();
    table.remove("service");
    table.remove("region");
    let file = parser.file(table);
    (errors.is_empty() && parser.problems.is_empty()).then_some(file)
}

fn line_starts(text: &str) -> Vec<usize> {
    std::iter::once(0).chain(text.match_indices('\n').map(|(i, _)| i + 1)).collect()
}

type TomlTable<'i> = DeTable<'i>;
type Span = Range<usize>;

/// Positions of services, backends and regions, for the rules that are checked last.
#[derive(Default)]
struct Positions {
    services: HashMap<Name, Span>,
    backends: HashMap<(Name, Name), Span>,
    regions: HashMap<Name, Span>,
    /// Values of the keys of services (`service web`) and backends (`backend web/a`); those of a part have its name before
    /// theirs (`health.path`).
    keys: HashMap<(String, String), Span>,
}

impl Positions {
    /// Notes where the keys of a table are.
    fn note_keys(&mut self, subject: &str, table: &TomlTable<'_>) {
        for (key, value) in table {
            let key = key.get_ref();
            self.keys.insert((subject.to_owned(), key.to_string()), value.span());
            if let DeValue::Table(part) = value.get_ref() {
                for (inner, value) in part {
                    self.keys
                        .insert((subject.to_owned(), format!("{key}.{}", inner.get_ref())), value.span());
                }
            }
        }
    }

    /// The place of the key that a rule's message names, as in `service web: health: path ...`.
    fn of_key(&self, message: &str) -> Option<Span> {
        let (subject, rest) = message.split_once(": ")?;
        let mut words = rest.split([' ', ':', ',']).filter(|word| !word.is_empty());
        let (first, second) = (words.next()?, words.next().unwrap_or_default());
        let find = |key: String| self.keys.get(&(subject.to_owned(), key)).cloned();
        find(format!("{first}.{second}")).or_else(|| find(first.to_owned()))
    }
}

struct Parser<'t> {
    text: &'t str,
    lines: Vec<usize>,
    problems: Vec<(Span, ConfigProblem)>,
}

impl Parser<'_> {
    fn problem(&mut self, span: Option<Span>, what: String) {
        let at = span.as_ref().map(|span| {
            let offset = span.start.min(self.text.len());
            let line = self.lines.partition_point(|&start| start <= offset);
            let start = self.lines[line - 1];
            (line, self.text[start..offset].chars().count() + 1)
        });
        self.problems.push((span.unwrap_or(0..0), ConfigProblem { at, what }));
    }

    fn finish(mut self) -> Vec<ConfigProblem> {
        self.problems.sort_by_key(|(span, _)| span.start);
        self.problems.into_iter().map(|(_, problem)| problem).collect()
    }

    fn file(&mut self, mut table: TomlTable<'_>) -> File {
        self.check_keys(&mut table, keys::TOP, "the file");
        let mut file = File::default();
        if let Some(revision) = table.remove("revision") {
            match revision.get_ref() {
                DeValue::Integer(number) => match number.as_str().parse() {
                    Ok(number) => file.revision = Some(number),
                    Err(_) => self.problem(Some(revision.span()), "revision must be a number".to_owned()),
                },
                _ => self.problem(Some(revision.span()), "revision must be a number".to_owned()),
            }
        }
        if let Some(lbd) = table.remove("lbd")
            && let Some((span, mut lbd)) = self.table(lbd, "[lbd]")
        {
            self.check_keys(&mut lbd, keys::LBD, "[lbd]");
            file.options = self.read::<Options>(span, lbd, "[lbd]").unwrap_or_default();
        }
        if let Some(hooks) = table.remove("hook") {
            for hook in self.array(hooks, "hook", "[[hook]]") {
                file.hooks.extend(self.hook(hook));
            }
        }
        let (services, regions) = (table.remove("service"), table.remove("region"));
        if services.is_some() || regions.is_some() {
            let mut positions = Positions::default();
            let mut desired = Desired::default();
            if let (None, Some(regions)) = (&services, &regions) {
                self.problem(
                    Some(regions.span()),
                    "[[region]] without [[service]]: regions belong to the desired state, which a file must contain completely or \
                     not at all; add service = [] for no services"
                        .to_owned(),
                );
            }
            let regions = regions.map(|regions| self.array(regions, "region", "[[region]]"));
            for region in regions.into_iter().flatten() {
                self.region(region, &mut desired, &mut positions);
            }
            let services = services.map(|services| self.array(services, "service", "[[service]]"));
            for service in services.into_iter().flatten() {
                self.service(service, &mut desired, &mut positions);
            }
            // The rules are for complete states: with parts missing they would report wrong problems.
            if self.problems.is_empty() {
                for invalid in desired.check() {
                    let span = match invalid.subject() {
                        Subject::Backend(service, backend) => {
                            positions.backends.get(&(service.clone(), backend.clone()))
                        }
                        Subject::Service(service) => positions.services.get(service),
                        Subject::Region(region) => positions.regions.get(region),
                        Subject::Lists => None,
                    };
                    let message = invalid.to_string();
                    let span = positions.of_key(&message).or_else(|| span.cloned());
                    self.problem(span, message);
                }
            }
            file.desired = Some(desired);
        }
        file
    }

    fn hook(&mut self, value: Spanned<DeValue<'_>>) -> Option<Hook> {
        let (span, mut table) = self.table(value, "[[hook]]")?;
        self.check_keys(&mut table, keys::HOOK, "[[hook]]");
        let spans: HashMap<String, Span> =
            table.iter().map(|(key, value)| (key.get_ref().to_string(), value.span())).collect();
        let hook = self.read::<Hook>(span.clone(), table, "[[hook]]")?;
        if let Some((key, what)) = hook.check() {
            self.problem(spans.get(key).cloned().or(Some(span)), what);
        }
        Some(hook)
    }

    fn service(&mut self, value: Spanned<DeValue<'_>>, desired: &mut Desired, positions: &mut Positions) {
        let Some((span, mut table)) = self.table(value, "[[service]]") else { return };
        self.check_keys(&mut table, keys::SERVICE, "[[service]]");
        let backends = table.remove("backend");
        if let Some(health) = table.get_mut("health")
            && let DeValue::Table(health) = health.get_mut()
        {
            self.check_keys(health, keys::HEALTH, "[service.health]");
        }
        if let Some(replica) = table.get_mut("replica")
            && let DeValue::Table(replica) = replica.get_mut()
        {
            self.check_keys(replica, keys::REPLICA, "[service.replica]");
            if let Some(metrics) = replica.get_mut("metrics")
                && let DeValue::Table(metrics) = metrics.get_mut()
            {
                self.check_keys(metrics, keys::METRICS, "[service.replica.metrics]");
            }
        }
        for (key, known, place) in
            [("regions", keys::REGIONS, "[service.regions]"), ("rollout", keys::ROLLOUT, "[service.rollout]")]
        {
            if let Some(part) = table.get_mut(key)
                && let DeValue::Table(part) = part.get_mut()
            {
                self.check_keys(part, known, place);
            }
        }
        let name = self.name(&span, &mut table, "[[service]]");
        if let Some((name, _)) = &name {
            positions.note_keys(&format!("service {name}"), &table);
        }
        let service = self.read::<Service>(span.clone(), table, "[[service]]");
        let mut found = BTreeMap::new();
        if let Some(backends) = backends {
            for backend in self.array(backends, "backend", "[[service.backend]]") {
                self.backend(backend, name.as_ref(), &mut found, positions);
            }
        }
        let (Some((name, name_span)), Some(mut service)) = (name, service) else { return };
        service.backends = found;
        if let Some(first) = positions.services.insert(name.clone(), name_span.clone()) {
            let line = self.line(&first);
            self.problem(Some(name_span), format!("a second service {name}; the first is in line {line}"));
        }
        desired.services.insert(name, service.into());
    }

    fn region(&mut self, value: Spanned<DeValue<'_>>, desired: &mut Desired, positions: &mut Positions) {
        let Some((span, mut table)) = self.table(value, "[[region]]") else { return };
        self.check_keys(&mut table, keys::REGION, "[[region]]");
        let name = self.name(&span, &mut table, "[[region]]");
        let region = self.read::<Region>(span, table, "[[region]]");
        let (Some((name, span)), Some(region)) = (name, region) else { return };
        if let Some(first) = positions.regions.insert(name.clone(), span.clone()) {
            let line = self.line(&first);
            self.problem(Some(span), format!("a second region {name}; the first is in line {line}"));
        }
        desired.regions.insert(name, region);
    }

    fn backend(
        &mut self,
        value: Spanned<DeValue<'_>>,
        service: Option<&(Name, Span)>,
        found: &mut BTreeMap<Name, Backend>,
        positions: &mut Positions,
    ) {
        let Some((span, mut table)) = self.table(value, "[[service.backend]]") else { return };
        self.check_keys(&mut table, keys::BACKEND, "[[service.backend]]");
        let name = self.name(&span, &mut table, "[[service.backend]]");
        if let (Some((service, _)), Some((name, _))) = (service, &name) {
            positions.note_keys(&format!("backend {service}/{name}"), &table);
        }
        let backend = self.read::<Backend>(span, table, "[[service.backend]]");
        let (Some((name, span)), Some(backend)) = (name, backend) else { return };
        if let Some((service, _)) = service {
            let key = (service.clone(), name.clone());
            if let Some(first) = positions.backends.insert(key, span.clone()) {
                let line = self.line(&first);
                self.problem(
                    Some(span),
                    format!("a second backend {name} of service {service}; the first is in line {line}"),
                );
            }
        }
        found.insert(name, backend);
    }

    fn line(&self, span: &Span) -> usize {
        self.lines.partition_point(|&start| start <= span.start)
    }

    /// Reports unknown keys and removes them, so that the rest can still be read.
    fn check_keys(&mut self, table: &mut TomlTable<'_>, known: &[&'static str], place: &str) {
        let unknown: Vec<_> =
            table.keys().filter(|k| !known.contains(&k.get_ref().as_ref())).cloned().collect();
        for key in unknown {
            let word = key.get_ref().as_ref();
            let hint = match nearest(word, known.iter().copied()) {
                Some(near) => format!("did you mean {near}?"),
                None => format!("known keys: {}", known.join(", ")),
            };
            self.problem(Some(key.span()), format!("unknown key {word} in {place}; {hint}"));
            table.remove(&key);
        }
    }

    fn table<'i>(&mut self, value: Spanned<DeValue<'i>>, place: &str) -> Option<(Span, TomlTable<'i>)> {
        let span = value.span();
        match value.into_inner() {
            DeValue::Table(table) => Some((span, table)),
            other => {
                let found = other.type_str();
                self.problem(Some(span), format!("expected the table {place}, found {found}"));
                None
            }
        }
    }

    fn array<'i>(
        &mut self,
        value: Spanned<DeValue<'i>>,
        key: &str,
        place: &str,
    ) -> Vec<Spanned<DeValue<'i>>> {
        let span = value.span();
        match value.into_inner() {
            DeValue::Array(array) => array.into_iter().collect(),
            DeValue::Table(_) => {
                self.problem(
                    Some(span),
                    format!("several are possible: write {place} instead of single brackets"),
                );
                Vec::new()
            }
            other => {
                let found = other.type_str();
                self.problem(Some(span), format!("{key} must be the tables {place}, found {found}"));
                Vec::new()
            }
        }
    }

    /// Removes and parses the `name` of a table.
    fn name(&mut self, span: &Span, table: &mut TomlTable<'_>, place: &str) -> Option<(Name, Span)> {
        let Some(value) = table.remove("name") else {
            self.problem(Some(span.clone()), format!("{place} has no name: add name = \"...\""));
            return None;
        };
        let span = value.span();
        match value.get_ref().as_str() {
            Some(text) => match text.parse::<Name>() {
                Ok(name) => Some((name, span)),
                Err(error) => {
                    self.problem(Some(span), error.to_string());
                    None
                }
            },
            None => {
                let found = value.get_ref().type_str();
                self.problem(Some(span), format!("name must be a string, found {found}"));
                None
            }
        }
    }

    /// Deserializes a table without unknown keys. Each wrong value is reported and removed in turn, so
    /// that all of them are found.
    fn read<T: DeserializeOwned>(&mut self, span: Span, mut table: TomlTable<'_>, place: &str) -> Option<T> {
        let mut removed = Vec::new();
        loop {
            let whole = Spanned::new(span.clone(), DeValue::Table(table.clone()));
            let error = match T::deserialize(ValueDeserializer::from(whole)) {
                Ok(thing) => return removed.is_empty().then_some(thing),
                Err(error) => error,
            };
            let message = words::of_value(error.message());
            let message = message.as_str();
            let missing = message.strip_prefix("missing field `").and_then(|m| m.strip_suffix('`'));
            let at = error.span().unwrap_or_else(|| span.clone());
            let place_of_key = named_in(&table, message, &at, &span).unwrap_or_else(|| at.clone());
            let bad = table.iter().find(|(_, v)| v.span().start <= at.start && at.end <= v.span().end);
            let Some(key) = bad.map(|(k, _)| k.clone()).filter(|_| at != span) else {
                match missing {
                    // The field was present, and was reported as wrong.
                    Some(field) if removed.iter().any(|r| r == field) => {}
                    Some(field) => self.problem(Some(at), format!("{place} has no {field}")),
                    None => self.problem(Some(place_of_key), message.to_owned()),
                }
                return None;
            };
            let key_name = key.get_ref().as_ref().to_owned();
            self.problem(
                Some(place_of_key),
                match missing {
                    Some(field) => format!("{key_name} has no {field}"),
                    None => format!("{key_name}: {message}"),
                },
            );
            table.remove(&key);
            removed.push(key_name);
        }
    }
}

/// A rule that concerns several keys of a part, such as `[service.health]`, is told without a place, or with that of the
/// part: the place of the key whose name is the first word of the message.
fn named_in(table: &TomlTable<'_>, message: &str, at: &Span, whole: &Span) -> Option<Span> {
    let word = message.trim_start_matches("health: ").split([' ', ':']).next()?;
    let parts = table.values().filter_map(|value| match value.get_ref() {
        DeValue::Table(part) => Some((value.span(), part)),
        _ => None,
    });
    let mut found = parts.filter_map(|(span, part)| {
        let value = part.iter().find(|(key, _)| key.get_ref().as_ref() == word)?.1.span();
        // Any other place is better than a guess.
        (*at == span || (at.start <= span.start && span.end <= at.end) || at == whole).then_some(value)
    });
    let first = found.next()?;
    found.next().is_none().then_some(first)
}
