//! Output of writes: the differences that a change made or would make.

use super::{Out, Tone};
use crate::{
    desired::model::{Difference, Name},
    serve::api::types::Change,
};
use serde_json::{Map, Value};
use std::io;

/// Prints differences, one line per setting: `+` added, `-` removed, `~` changed.
///
/// # Errors
/// Writing failed.
pub fn differences(out: &mut Out<'_>, list: &[Difference]) -> io::Result<()> {
    for difference in list {
        match difference {
            Difference::Add { service, backend, to } => {
                service_or_backend(out, ("+", Tone::Good), service, backend.as_ref(), to)?;
            }
            Difference::Remove { service, backend, from } => {
                service_or_backend(out, ("-", Tone::Bad), service, backend.as_ref(), from)?;
            }
            Difference::Set { .. } | Difference::Region { .. } | Difference::List { .. } => {
                let text = format!("~ {difference}");
                out.line(out.paint(Tone::Warn, &text))?;
            }
        }
    }
    Ok(())
}

/// Prints an added or removed service or backend with its settings.
fn service_or_backend(
    out: &mut Out<'_>,
    (sign, tone): (&str, Tone),
    service: &Name,
    backend: Option<&Name>,
    spec: &Value,
) -> io::Result<()> {
    let empty = Map::new();
    let fields = spec.as_object().unwrap_or(&empty);
    let text = |v: &Value| v.as_str().map_or_else(|| v.to_string(), str::to_owned);
    let backend_line = |fields: &Map<String, Value>| {
        let get = |key| fields.get(key).map(text).unwrap_or_default();
        format!("{} weight {} {}", get("address"), get("weight"), get("state"))
    };
    if let Some(backend) = backend {
        return out
            .line(out.paint(tone, &format!("{sign} backend {service}/{backend}: {}", backend_line(fields))));
    }
    out.line(out.paint(tone, &format!("{sign} service {service}")))?;
    for (key, value) in fields.iter().filter(|(key, _)| *key != "backends") {
        out.line(out.paint(tone, &format!("{sign}     {key}: {}", text(value))))?;
    }
    let backends = fields.get("backends").and_then(Value::as_object).unwrap_or(&empty);
    for (name, backend) in backends {
        let line = backend.as_object().map(backend_line).unwrap_or_default();
        out.line(out.paint(tone, &format!("{sign}     backend {name}: {line}")))?;
    }
    Ok(())
}

/// Summarises a write on one line, for standard error.
pub fn summary(what: &str, change: &Change) -> String {
    if change.dry_run {
        return match change.differences.len() {
            0 => "dry run: nothing would change".to_owned(),
            1 => "dry run: 1 change, nothing written".to_owned(),
            n => format!("dry run: {n} changes, nothing written"),
        };
    }
    match &change.applied {
        None => format!("{what}: unchanged (revision {})", change.revision),
        Some(applied) => {
            let took = super::units::micros(applied.took_us);
            let but = match &applied.waiting[..] {
                [] => String::new(),
                [one] => format!(", but not yet to service {one}: see `lbctl status`"),
                all => format!(", but not yet to {} services: see `lbctl status`", all.len()),
            };
            format!("{what} (revision {}, applied in {took}{but})", change.revision)
        }
    }
}
