//! Parsers of flag values: addresses with ports, health checks, sources of replica state, rates.
//!
//! Input: the value of a flag. Output: the parsed value, or a message that says what is accepted. Called by clap.

use super::Failure;
use crate::desired::model::{
    Name, Ports, Protocol, Quantity, QuicConfig, QuicError, Rate, RateError, Selector, SelectorError,
    SourceKind,
};
use clap::{
    Arg, Command,
    builder::{PossibleValue, TypedValueParser},
};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::{ffi::OsStr, marker::PhantomData, net::IpAddr, str::FromStr, time::Duration};

/// Parses a variant of an enum, spelt as in the configuration file.
pub(super) fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(json!(text)).map_err(|e| e.to_string())
}

/// Parses a variant of an enum, and knows all of them: for the help, for errors and for completion.
#[derive(Clone)]
pub(super) struct Variant<T> {
    known: Vec<String>,
    parsed: PhantomData<fn() -> T>,
}

/// Parser of an enum whose variants serde lists.
pub(super) fn variant<T: DeserializeOwned>() -> Variant<T> {
    // The message about an unknown variant lists the known ones in backticks, after the unknown one.
    let message = word::<T>("").err().unwrap_or_default();
    let known = message.split('`').skip(1).step_by(2).skip(1).map(str::to_owned).collect();
    Variant { known, parsed: PhantomData }
}

/// Parser of an enum that serde parses from a text.
pub(super) fn variant_of<T>(known: &[&str]) -> Variant<T> {
    Variant { known: known.iter().map(|&word| word.to_owned()).collect(), parsed: PhantomData }
}

impl<T: DeserializeOwned + Clone + Send + Sync + 'static> TypedValueParser for Variant<T> {
    type Value = T;

    fn parse_ref(&self, command: &Command, arg: Option<&Arg>, value: &OsStr) -> Result<T, clap::Error> {
        let text = value.to_string_lossy();
        word::<T>(&text).map_err(|why| {
            let why = crate::desired::config::value_words(&why);
            let arg = arg.map(ToString::to_string).unwrap_or_default();
            let what =
                format!("invalid value '{text}' for '{arg}': {why}\n\nFor more information, try '--help'.\n");
            clap::Error::raw(clap::error::ErrorKind::ValueValidation, what).with_cmd(command)
        })
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        // Made once for each flag of a process.
        let leaked = |word: &String| PossibleValue::new(&*word.clone().leak());
        Some(Box::new(self.known.iter().map(leaked)))
    }
}

/// Parses a QUIC-LB configuration, or `off`.
pub(super) fn quic(text: &str) -> Result<Option<QuicConfig>, String> {
    if text == "off" { Ok(None) } else { text.parse().map(Some).map_err(|e: QuicError| e.to_string()) }
}

/// Whole seconds of a flag that the state keeps in seconds.
pub(super) fn seconds(time: Option<Duration>, flag: &str) -> Result<Option<u64>, Failure> {
    match time {
        Some(time) if time.subsec_millis() != 0 => {
            Err(Failure::Usage { what: format!("{flag} takes whole seconds, not {time:?}") })
        }
        other => Ok(other.map(|t| t.as_secs())),
    }
}

/// A number, or `auto` or `none`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Optional(pub(super) Option<u64>);

pub(super) fn optional(text: &str) -> Result<Optional, String> {
    match text {
        "auto" | "none" => Ok(Optional(None)),
        _ => text.parse().map(|n| Optional(Some(n))).map_err(|_| "give a number, or auto or none".to_owned()),
    }
}

/// A rate, or `none`.
#[derive(Clone, Copy, Debug)]
pub(super) struct OptionalRate(pub(super) Option<Rate>);

pub(super) fn optional_rate(text: &str) -> Result<OptionalRate, String> {
    match text {
        "none" => Ok(OptionalRate(None)),
        _ => text.parse().map(|rate| OptionalRate(Some(rate))).map_err(|e: RateError| e.to_string()),
    }
}

/// `true`, `false` or `auto`.
#[derive(Clone, Copy, Debug)]
pub(super) struct OptionalBool(pub(super) Option<bool>);

pub(super) fn optional_bool(text: &str) -> Result<OptionalBool, String> {
    match text {
        "auto" => Ok(OptionalBool(None)),
        _ => text.parse().map(|b| OptionalBool(Some(b))).map_err(|_| "give true, false or auto".to_owned()),
    }
}

/// A virtual address, `ADDRESS[:PORT[/PROTOCOL]]`; IPv6 with a port in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vip {
    pub(super) address: IpAddr,
    pub(super) port: Option<Ports>,
    pub(super) protocol: Option<Protocol>,
}

impl FromStr for Vip {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse() {
            return Ok(Self { address, port: None, protocol: None });
        }
        let bad = || {
            format!(
                "{text:?} is not ADDRESS, ADDRESS:PORT or ADDRESS:PORT/PROTOCOL (with a port, IPv6 in brackets)"
            )
        };
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, protocol)) => (rest, Some(protocol.parse::<Protocol>().map_err(|e| e.to_string())?)),
            None => (text, None),
        };
        let (address, port) = rest.rsplit_once(':').ok_or_else(bad)?;
        let bracketed = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
        let address: IpAddr = bracketed.unwrap_or(address).parse().map_err(|_| bad())?;
        if address.is_ipv6() != bracketed.is_some() {
            return Err(bad());
        }
        let port = port.parse::<Ports>().map_err(|e| e.to_string())?;
        Ok(Self { address, port: Some(port), protocol })
    }
}

/// A health check: `none`, `KIND[:PORT]`, `http[s][:[PORT][/PATH]]`, `grpc[s][:[PORT][/SERVICE]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CheckSpec {
    pub(super) kind: &'static str,
    pub(super) port: Option<u16>,
    pub(super) path: Option<String>,
    pub(super) service: Option<String>,
}

impl FromStr for CheckSpec {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            "give none, tcp, tls, http, https, grpc or grpcs, optionally followed by :PORT, :/PATH or :PORT/PATH"
                .to_owned()
        };
        let (kind, rest) = text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest)));
        let kinds = ["none", "tcp", "tls", "http", "https", "grpc", "grpcs"];
        let kind = kinds.into_iter().find(|k| *k == kind).ok_or_else(bad)?;
        let (port, tail) = match rest {
            None => ("", ""),
            Some(rest) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
        };
        let port = match port {
            "" => None,
            port => Some(port.parse::<u16>().ok().filter(|n| *n > 0).ok_or_else(bad)?),
        };
        let (mut path, mut service) = (None, None);
        match kind {
            "none" if rest.is_some() => return Err(bad()),
            "none" => {}
            "tcp" | "tls" if !tail.is_empty() || rest == Some("") => return Err(bad()),
            "tcp" | "tls" => {}
            "http" | "https" => path = Some(if tail.is_empty() { "/" } else { tail }.to_owned()),
            _ => service = tail.strip_prefix('/').filter(|s| !s.is_empty()).map(str::to_owned),
        }
        Ok(Self { kind, port, path, service })
    }
}

/// Parses `NAME: VALUE`.
pub(super) fn header(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or_else(|| "give NAME: VALUE, with a colon".to_owned())?;
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// A source of replica state: `none`, or `KIND[:[PORT][/PATH]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source(pub(super) Option<(SourceKind, Option<u16>, Option<String>)>);

impl FromStr for Source {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            "give none, or stream, vllm, sglang, tgi, triton or custom optionally followed by :PORT, :/PATH or :PORT/PATH"
                .to_owned()
        };
        if text == "none" {
            return Ok(Self(None));
        }
        let (kind, rest) = text.split_once(':').map_or((text, ""), |(kind, rest)| (kind, rest));
        let kind = word::<SourceKind>(kind).map_err(|_| bad())?;
        if text.ends_with(':') {
            return Err(bad());
        }
        let (port, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let port = match port {
            "" => None,
            port => Some(port.parse().ok().filter(|n| *n > 0).ok_or_else(bad)?),
        };
        Ok(Self(Some((kind, port, Some(path).filter(|p| !p.is_empty()).map(str::to_owned)))))
    }
}

/// Names of regions, or `any`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ResidencySpec(pub(super) Option<Vec<Name>>);

pub(super) fn regions(text: &str) -> Result<ResidencySpec, String> {
    if text == "any" {
        return Ok(ResidencySpec(None));
    }
    let names = text.split(',').map(|name| name.trim().parse::<Name>().map_err(|e| e.to_string()));
    Ok(ResidencySpec(Some(names.collect::<Result<_, _>>()?)))
}

/// Parses `REGION=N`.
pub(super) fn region_weight(text: &str) -> Result<(Name, u32), String> {
    let bad = || "give REGION=N, such as eu=3".to_owned();
    let (name, weight) = text.split_once('=').ok_or_else(bad)?;
    Ok((name.trim().parse().map_err(|_| bad())?, weight.trim().parse().map_err(|_| bad())?))
}

/// Parses `QUANTITY=METRIC`.
pub(super) fn metric(text: &str) -> Result<(Quantity, Selector), String> {
    let (quantity, selector) =
        text.split_once('=').ok_or_else(|| "give QUANTITY=METRIC, such as running=busy_slots".to_owned())?;
    let selector = selector.parse().map_err(|e: SelectorError| e.to_string())?;
    Ok((word(quantity)?, selector))
}

/// An HTTP status or a range of them: `200`, `200-299`.
#[derive(Clone, Debug)]
pub(super) struct Statuses(pub(super) u16, pub(super) u16);

impl FromStr for Statuses {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) => Ok(Self(first, last)),
            _ => Err("give a status or a range, such as 200 or 200-299".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vips_may_carry_port_and_protocol() {
        let vip = |t: &str| t.parse::<Vip>().map(|v| (v.address.to_string(), v.port, v.protocol));
        assert_eq!(vip("10.0.0.1"), Ok(("10.0.0.1".into(), None, None)));
        assert_eq!(vip("fd00::1"), Ok(("fd00::1".into(), None, None)));
        assert_eq!(
            vip("10.0.0.1:80/tcp"),
            Ok(("10.0.0.1".into(), Some(Ports::One(80)), Some(Protocol::Tcp)))
        );
        assert_eq!(
            vip("[fd00::1]:1-9/udp"),
            Ok(("fd00::1".into(), Some(Ports::Range(1, 9)), Some(Protocol::Udp)))
        );
        assert_eq!(vip("10.0.0.1:any"), Ok(("10.0.0.1".into(), Some(Ports::Any), None)));
        for bad in ["", "x", "10.0.0.1:0", "10.0.0.1:80/sctp", "10.0.0.1/tcp", "[10.0.0.1]:80", "10.0.0.1:"] {
            assert!(vip(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sources_are_short() {
        let source =
            |t: &str| t.parse::<Source>().map(|s| s.0.map(|(k, port, path)| (k.label(), port, path)));
        assert_eq!(source("none"), Ok(None));
        assert_eq!(source("stream"), Ok(Some(("stream", None, None))));
        assert_eq!(source("vllm:8000"), Ok(Some(("vllm", Some(8_000), None))));
        assert_eq!(source("tgi:/m?x=1"), Ok(Some(("tgi", None, Some("/m?x=1".into())))));
        assert_eq!(source("triton:8002/metrics"), Ok(Some(("triton", Some(8_002), Some("/metrics".into())))));
        for bad in ["", "ollama", "stream:", "vllm:0", "vllm:x", "none:1"] {
            assert!(source(bad).is_err(), "{bad}");
        }
        let (quantity, selector) = metric("waiting=q{kind=\"all\"}").unwrap();
        assert_eq!((quantity, selector.to_string().as_str()), (Quantity::Waiting, "q{kind=\"all\"}"));
        for bad in ["waiting", "waitin=q", "waiting=", "waiting=a b"] {
            assert!(metric(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn checks_are_short() {
        let check = |t: &str| t.parse::<CheckSpec>().map(|c| (c.kind, c.port, c.path.or(c.service)));
        assert_eq!(check("none"), Ok(("none", None, None)));
        assert_eq!(check("tcp:81"), Ok(("tcp", Some(81), None)));
        assert_eq!(check("http"), Ok(("http", None, Some("/".into()))));
        assert_eq!(check("http:/a?b:c"), Ok(("http", None, Some("/a?b:c".into()))));
        assert_eq!(check("http:8080/a/b"), Ok(("http", Some(8080), Some("/a/b".into()))));
        assert_eq!(check("http:8080"), Ok(("http", Some(8080), Some("/".into()))));
        assert_eq!(check("https:8443/ready"), Ok(("https", Some(8443), Some("/ready".into()))));
        assert_eq!(check("tls"), Ok(("tls", None, None)));
        assert_eq!(check("grpc:50051/chat.v1.Chat"), Ok(("grpc", Some(50051), Some("chat.v1.Chat".into()))));
        assert_eq!(check("grpcs:50051"), Ok(("grpcs", Some(50051), None)));
        for bad in ["", "udp", "tls:/x", "grpc:x", "tcp:", "tcp:x", "tcp:0", "none:1", "http:x/"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
