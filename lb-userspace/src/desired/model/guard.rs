//! Deny and allow lists, as the operator wants them.
//!
//! A list may have a million entries, so it is kept in parts (by an address's leading bits) that revisions share: the
//! cost of a change, in memory, in the store and on the wire, depends on what it changes.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

/// Name of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ListName {
    /// Sources whose packets are dropped.
    Deny,
    /// Exceptions to the deny list.
    Allow,
}

impl ListName {
    /// Both names.
    pub const ALL: [Self; 2] = [Self::Deny, Self::Allow];

    /// Name of the list in commands and JSON.
    pub fn label(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Allow => "allow",
        }
    }
}

/// Prefixes, and when each expires: seconds since 1970 UTC, or 0 for never.
pub type Part = BTreeMap<IpNet, u64>;

/// A list: its parts by [`part_of`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct List(pub BTreeMap<String, Arc<Part>>);

/// Both lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guard {
    /// Sources whose packets to services are dropped.
    #[serde(default, skip_serializing_if = "List::is_empty")]
    pub deny: List,
    /// Exceptions: where both lists have prefixes that contain an address the longer one decides, and of equal ones this.
    #[serde(default, skip_serializing_if = "List::is_empty")]
    pub allow: List,
}

/// Name of the part that holds a prefix: its family and its first 12 (IPv4) or 24 (IPv6) bits.
pub fn part_of(net: IpNet) -> String {
    match net {
        IpNet::V4(net) => format!("4-{:03x}", u32::from(net.network()) >> 20),
        IpNet::V6(net) => format!("6-{:06x}", u128::from(net.network()) >> 104),
    }
}

/// Canonical form of a prefix in lists: without host bits, and IPv4-mapped prefixes as IPv4.
pub fn normal(net: IpNet) -> IpNet {
    if let IpNet::V6(v6) = net
        && v6.prefix_len() >= 96
        && let Some(v4) = v6.network().to_ipv4_mapped()
        && let Ok(v4) = Ipv4Net::new(v4, v6.prefix_len() - 96)
    {
        return IpNet::V4(v4.trunc());
    }
    net.trunc()
}

/// Whether an entry has not expired at this time.
pub fn stands(until: u64, now_s: u64) -> bool {
    until == 0 || until > now_s
}

impl List {
    /// Whether the list has no entry.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.0.values().map(|part| part.len()).sum()
    }

    /// When a prefix expires, if it is listed.
    pub fn get(&self, net: IpNet) -> Option<u64> {
        self.0.get(&part_of(net))?.get(&net).copied()
    }

    /// All entries; within a part in order of their addresses.
    pub fn iter(&self) -> impl Iterator<Item = (IpNet, u64)> {
        self.0.values().flat_map(|part| part.iter().map(|(net, until)| (*net, *until)))
    }

    /// Adds a prefix in its [`normal`] form.
    pub fn insert(&mut self, net: IpNet, until: u64) {
        Arc::make_mut(self.0.entry(part_of(net)).or_default()).insert(net, until);
    }

    /// Removes a prefix; false if it was not listed.
    pub fn remove(&mut self, net: IpNet) -> bool {
        let name = part_of(net);
        let Some(part) = self.0.get_mut(&name) else { return false };
        if !part.contains_key(&net) {
            return false;
        }
        let part = Arc::make_mut(part);
        part.remove(&net);
        if part.is_empty() {
            self.0.remove(&name);
        }
        true
    }

    /// Removes expired entries; returns their number.
    pub fn expire(&mut self, now_s: u64) -> usize {
        let over: Vec<IpNet> =
            self.iter().filter(|(_, until)| !stands(*until, now_s)).map(|(net, _)| net).collect();
        for net in &over {
            self.remove(*net);
        }
        over.len()
    }

    /// Shares the parts that equal those of `old`.
    pub fn share(&mut self, old: &Self) {
        for (name, part) in &mut self.0 {
            if let Some(same) = old.0.get(name).filter(|same| !Arc::ptr_eq(same, part) && *same == part) {
                part.clone_from(same);
            }
        }
    }

    /// Longest unexpired prefix that contains an address, and when it expires.
    pub fn longest(&self, address: IpAddr, now_s: u64) -> Option<(IpNet, u64)> {
        let width: u8 = if address.is_ipv4() { 32 } else { 128 };
        (0..=width).rev().find_map(|bits| {
            let net = IpNet::new(address, bits).ok()?.trunc();
            let until = self.get(net).filter(|until| stands(*until, now_s))?;
            Some((net, until))
        })
    }

    /// Names of parts that differ.
    fn changed<'a>(&'a self, old: &'a Self) -> impl Iterator<Item = &'a String> {
        let here = self.0.iter().filter(|(name, part)| {
            old.0.get(*name).is_none_or(|before| !Arc::ptr_eq(before, part) && before != *part)
        });
        let gone = old.0.keys().filter(|name| !self.0.contains_key(*name));
        here.map(|(name, _)| name).chain(gone)
    }

    /// Prefixes that were added, changed or removed since `old`, with old and new expiry.
    pub fn changes(&self, old: &Self) -> Vec<(IpNet, Option<u64>, Option<u64>)> {
        let none = Part::new();
        let mut found = Vec::new();
        for name in self.changed(old) {
            let before = old.0.get(name).map_or(&none, |part| part);
            let after = self.0.get(name).map_or(&none, |part| part);
            found.extend(
                before.iter().filter(|(net, _)| !after.contains_key(*net)).map(|(n, u)| (*n, Some(*u), None)),
            );
            for (net, until) in after {
                let was = before.get(net).copied();
                if was != Some(*until) {
                    found.push((*net, was, Some(*until)));
                }
            }
        }
        found
    }

    /// Describes the first mistake in a hand-written list: entries in the wrong part, or not in [`normal`] form. Parts that
    /// equal those of `old` are not checked.
    fn problem(&self, old: &Self) -> Option<String> {
        for name in self.changed(old) {
            let Some(part) = self.0.get(name) else { continue };
            if let Some(net) = part.keys().find(|net| normal(**net) != **net) {
                return Some(format!("{net} must be written as {}", normal(*net)));
            }
            // Entries are sorted, so checking the first and the last of a part is enough.
            let (Some((first, _)), Some((last, _))) = (part.first_key_value(), part.last_key_value()) else {
                return Some(format!("part {name} is empty"));
            };
            if let Some(net) = [first, last].into_iter().find(|net| part_of(**net) != *name) {
                return Some(format!("{net} is in part {name}, but belongs in {}", part_of(*net)));
            }
        }
        None
    }
}

impl Guard {
    /// Whether both lists are empty.
    pub fn is_empty(&self) -> bool {
        self.deny.is_empty() && self.allow.is_empty()
    }

    /// Number of entries of both lists.
    pub fn len(&self) -> usize {
        self.deny.len() + self.allow.len()
    }

    /// Returns one of the lists.
    pub fn list(&self, name: ListName) -> &List {
        match name {
            ListName::Deny => &self.deny,
            ListName::Allow => &self.allow,
        }
    }

    /// Returns one of the lists, to change it.
    pub fn list_mut(&mut self, name: ListName) -> &mut List {
        match name {
            ListName::Deny => &mut self.deny,
            ListName::Allow => &mut self.allow,
        }
    }

    /// Shares the parts that equal those of `old`.
    pub fn share(&mut self, old: &Self) {
        self.deny.share(&old.deny);
        self.allow.share(&old.allow);
    }

    /// The entry that decides about an address, and when it expires.
    pub fn deciding_entry(&self, address: IpAddr, now_s: u64) -> Option<(ListName, IpNet, u64)> {
        let deny = self.deny.longest(address, now_s);
        let allow = self.allow.longest(address, now_s);
        match (deny, allow) {
            (Some((net, until)), Some((exception, _))) if net.prefix_len() > exception.prefix_len() => {
                Some((ListName::Deny, net, until))
            }
            (_, Some((net, until))) => Some((ListName::Allow, net, until)),
            (Some((net, until)), None) => Some((ListName::Deny, net, until)),
            (None, None) => None,
        }
    }

    /// Verdict of the entries for exactly this prefix: whether it is denied; none without an unexpired entry.
    pub fn verdict(&self, net: IpNet, now_s: u64) -> Option<bool> {
        let stands = |list: &List| list.get(net).is_some_and(|until| stands(until, now_s));
        if stands(&self.allow) { Some(false) } else { stands(&self.deny).then_some(true) }
    }

    /// Describes the first mistake, given that `old` is valid.
    pub fn problem(&self, old: &Self) -> Option<String> {
        ListName::ALL.into_iter().find_map(|name| {
            let found = self.list(name).problem(old.list(name));
            found.map(|what| format!("{} list: {what}", name.label()))
        })
    }
}

/// Parses `ADDRESS` or `ADDRESS/BITS`.
///
/// # Errors
/// Describes the mistake, and how to correct it.
pub fn parse(text: &str) -> Result<IpNet, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(normal(IpNet::from(address)));
    }
    let Some((address, bits)) = text.split_once('/') else {
        return Err(format!(
            "{text:?} is not a valid address or prefix: give one such as 192.0.2.7, 192.0.2.0/24 or 2001:db8::/32"
        ));
    };
    let Ok(address) = address.parse::<IpAddr>() else {
        return Err(format!("{address:?} is not a valid IP address"));
    };
    let width = if address.is_ipv4() { 32 } else { 128 };
    let bits = bits.parse::<u8>().ok().filter(|bits| *bits <= width);
    let Some(bits) = bits else {
        return Err(format!("{text:?} has no valid length: give 0 to {width} bits"));
    };
    let net = match address {
        IpAddr::V4(v4) => Ipv4Net::new(v4, bits).map(IpNet::V4),
        IpAddr::V6(v6) => Ipv6Net::new(v6, bits).map(IpNet::V6),
    };
    let net = net.map_err(|error| error.to_string())?;
    if net.trunc() != net {
        return Err(format!("{net} has bits set beyond its length: give {} or {address}", net.trunc()));
    }
    Ok(normal(net))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        parse(text).unwrap()
    }

    #[test]
    fn prefixes_are_read() {
        assert_eq!(net("192.0.2.7").to_string(), "192.0.2.7/32");
        assert_eq!(net("::ffff:192.0.2.0/120").to_string(), "192.0.2.0/24");
        assert_eq!(net("2001:DB8::/32").to_string(), "2001:db8::/32");
        for (bad, says) in [
            ("x", "not a valid address or prefix"),
            ("192.0.2.0/33", "0 to 32"),
            ("::/129", "0 to 128"),
            ("192.0.2.1/24", "give 192.0.2.0/24 or 192.0.2.1"),
            ("192.0.2/24", "not a valid IP address"),
            ("192.0.2.0/", "0 to 32"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(says), "{bad}: {error}");
        }
    }

    #[test]
    fn the_longest_decides_and_of_equals_the_exception() {
        let mut guard = Guard::default();
        for deny in ["10.0.0.0/8", "10.1.2.0/24", "10.1.2.9", "0.0.0.0/0", "2001:db8::/32"] {
            guard.deny.insert(net(deny), 0);
        }
        for allow in ["10.1.0.0/16", "10.1.2.0/24", "2001:db8:5::/48"] {
            guard.allow.insert(net(allow), 0);
        }
        let decides = |address: &str| {
            let (list, net, _) = guard.deciding_entry(address.parse().unwrap(), 1_000)?;
            Some(format!("{} {net}", list.label()))
        };
        assert_eq!(decides("10.9.0.1").as_deref(), Some("deny 10.0.0.0/8"));
        assert_eq!(decides("10.1.9.1").as_deref(), Some("allow 10.1.0.0/16"));
        assert_eq!(decides("10.1.2.1").as_deref(), Some("allow 10.1.2.0/24"));
        assert_eq!(decides("10.1.2.9").as_deref(), Some("deny 10.1.2.9/32"));
        assert_eq!(decides("192.0.2.1").as_deref(), Some("deny 0.0.0.0/0"));
        assert_eq!(decides("2001:db8:5::1").as_deref(), Some("allow 2001:db8:5::/48"));
        assert_eq!(decides("2001:db9::1"), None);
    }

    #[test]
    fn what_is_over_decides_nothing() {
        let mut guard = Guard::default();
        guard.deny.insert(net("10.0.0.0/8"), 0);
        guard.allow.insert(net("10.0.0.1"), 100);
        let list = |now| guard.deciding_entry("10.0.0.1".parse().unwrap(), now).map(|(list, ..)| list);
        assert_eq!((list(99), list(100)), (Some(ListName::Allow), Some(ListName::Deny)));
        assert_eq!((guard.allow.expire(99), guard.allow.expire(100)), (0, 1));
        assert!(guard.allow.is_empty());
    }

    #[test]
    fn changes_are_those_of_parts_that_differ() {
        let mut old = List::default();
        for i in 0..100u32 {
            old.insert(IpNet::from(IpAddr::from((i << 20).to_be_bytes())), 0);
        }
        let mut new = old.clone();
        new.insert(net("1.2.3.4"), 7);
        new.remove(net("0.16.0.0"));
        assert_eq!(
            old.0.iter().filter(|(k, p)| new.0.get(*k).is_some_and(|q| Arc::ptr_eq(p, q))).count(),
            98
        );
        assert_eq!(new.changes(&old), [(net("1.2.3.4"), None, Some(7)), (net("0.16.0.0"), Some(0), None)]);
        // Equal but not shared: shared again.
        let text = serde_json::to_string(&new).unwrap();
        let mut read: List = serde_json::from_str(&text).unwrap();
        assert_eq!(read, new);
        read.share(&new);
        assert!(read.0.iter().all(|(k, p)| Arc::ptr_eq(p, &new.0[k])));
        assert_eq!(read.len(), 100);
    }
}
