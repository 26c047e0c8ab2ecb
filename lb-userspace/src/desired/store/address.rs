//! Addresses of stores as text: `file:///var/lib/lb`, `etcd://10.0.0.1:2379,10.0.0.2:2379/lb`.

use super::StoreError;
use std::{fmt, path::PathBuf, str::FromStr};

/// Default port of etcd.
const PORT: u16 = 2379;
/// Default prefix of all keys.
const PREFIX: &str = "lb";

/// Address of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// Files in a directory.
    File(PathBuf),
    /// An etcd cluster.
    Etcd {
        /// `HOST:PORT` of each member that is used.
        members: Vec<String>,
        /// Prefix of all keys, without leading or trailing slashes.
        prefix: String,
        /// Whether TLS is used.
        tls: bool,
    },
}

impl FromStr for Address {
    type Err = StoreError;

    fn from_str(url: &str) -> Result<Self, StoreError> {
        let refused = |what: &str| StoreError::Address { url: url.to_owned(), what: what.to_owned() };
        let Some((scheme, rest)) = url.split_once("://") else {
            return Err(refused("the scheme is missing"));
        };
        let tls = match scheme {
            "file" if rest.starts_with('/') => return Ok(Self::File(rest.into())),
            "file" => return Err(refused("the directory must be an absolute path, after three slashes")),
            "etcd" => false,
            "etcds" => true,
            _ => return Err(refused("the scheme is unknown")),
        };
        let (hosts, prefix) = rest.split_once('/').unwrap_or((rest, PREFIX));
        let prefix = prefix.trim_matches('/');
        let prefix = if prefix.is_empty() { PREFIX } else { prefix };
        let fits = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if !prefix.chars().all(fits) {
            return Err(refused("the prefix may contain letters, digits and -_./ only"));
        }
        let members: Vec<String> =
            hosts.split(',').map(|host| member(host).ok_or(host)).collect::<Result<_, _>>().map_err(
                |host| {
                    refused(&format!("{host:?} is not a valid HOST:PORT (write IPv6 addresses in brackets)"))
                },
            )?;
        Ok(Self::Etcd { members, prefix: prefix.to_owned(), tls })
    }
}

fn member(host: &str) -> Option<String> {
    let after_address = host.rfind(']').unwrap_or(0);
    let (name, port) = match host[after_address..].find(':') {
        Some(colon) => {
            let (name, port) = host.split_at(after_address + colon);
            (name, port[1..].parse().ok().filter(|port| *port > 0)?)
        }
        None => (host, PORT),
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let is_v6 = name
        .strip_prefix('[')
        .and_then(|n| n.strip_suffix(']'))
        .is_some_and(|n| n.parse::<std::net::Ipv6Addr>().is_ok());
    let is_name = !name.is_empty() && name.chars().all(fits);
    (is_v6 || is_name).then(|| format!("{name}:{port}"))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(directory) => write!(f, "file://{}", directory.display()),
            Self::Etcd { members, prefix, tls } => {
                let scheme = if *tls { "etcds" } else { "etcd" };
                write!(f, "{scheme}://{}/{prefix}", members.join(","))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for (text, back) in [
            ("file:///var/lib/lb", "file:///var/lib/lb"),
            ("etcd://a", "etcd://a:2379/lb"),
            ("etcd://10.0.0.1:1,b:2/", "etcd://10.0.0.1:1,b:2/lb"),
            ("etcds://[fd00::1]:2379,[fd00::2]/eu/one/", "etcds://[fd00::1]:2379,[fd00::2]:2379/eu/one"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), back);
        }
        for (text, why) in [
            ("/var/lib/lb", "the scheme is missing"),
            ("file://var", "absolute path"),
            ("http://a", "unknown"),
            ("etcd://a:x", "\"a:x\" is not a valid HOST:PORT"),
            ("etcd://a,,b", "\"\" is not a valid HOST:PORT"),
            ("etcd://fd00::1", "brackets"),
            ("etcd://a/b c", "letters, digits"),
        ] {
            let error = text.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(why) && error.contains(text), "{text}: {error}");
        }
    }
}
