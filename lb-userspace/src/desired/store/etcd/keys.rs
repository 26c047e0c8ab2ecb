//! What the store's keys are called, and what is in them.
//!
//! All begin with the prefix and a slash:
//!
//! | key | value |
//! |---|---|
//! | `store` | [`Identity`]: whose data these are |
//! | `head` | [`Head`]: the newest revision; the one key that every commit compares and changes |
//! | `revisions/N` | [`Record`]: what revision N changed |
//! | `snapshots/N` | [`Parts`] of a [`Snapshot`]: the whole state at N |
//! | `parts/NONCE/I` | a piece of something too large for one request |
//! | `moved` | where the data has gone, if it has |
//! | `leased/KEY` | what a host tells, under its lease |
//! | `locks/NAME` | [`Held`], under a lease of its own |
//!
//! Revisions are written once and never changed, so whoever reads them while others write reads right.

use super::proto::{
    Against, Compare, CompareResult, CompareTarget, DeleteRangeRequest, Op, PutRequest, RangeRequest,
    RequestOp, SortOrder,
};
use crate::desired::{
    model::Desired,
    store::{Revision, Stored},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{fmt, str::FromStr, sync::Arc};

/// Version of this layout. Raised when an older lbd could no longer read it.
pub const FORMAT: u64 = 1;

/// Names of keys under a prefix.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Under this prefix.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// A key, or what several begin with.
    pub fn key(&self, name: &str) -> Vec<u8> {
        format!("{}/{name}", self.prefix).into_bytes()
    }

    /// Revision `n`; numbers sort as texts.
    pub fn revision(&self, n: u64) -> Vec<u8> {
        self.key(&format!("revisions/{n:020}"))
    }

    /// Snapshot at `n`.
    pub fn snapshot(&self, n: u64) -> Vec<u8> {
        self.key(&format!("snapshots/{n:020}"))
    }

    /// What follows the given name in a key.
    pub fn after<'k>(&self, name: &str, key: &'k [u8]) -> Option<&'k str> {
        std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?.strip_prefix('/')?.strip_prefix(name)
    }
}

/// The first key after all that begin with `key`.
pub fn end_of(key: &[u8]) -> Vec<u8> {
    let mut end = key.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Whose data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// [`FORMAT`] of what wrote it.
    pub format: u64,
    /// 16 hexadecimal digits.
    pub id: String,
}

/// The newest revision: its number, and the nonce of its record, so that two histories that differ are never
/// taken for one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Number; 0 is the empty state before any change.
    pub number: u64,
    /// Nonce; empty for 0.
    pub nonce: String,
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.number, self.nonce)
    }
}

impl FromStr for Head {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let odd = || format!("head is {text:?}");
        let (number, nonce) = text.split_once(' ').ok_or_else(odd)?;
        Ok(Self { number: number.parse().map_err(|_| odd())?, nonce: nonce.to_owned() })
    }
}

/// What a revision changed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Who made it.
    pub author: String,
    /// When, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// What for.
    pub message: String,
    /// Made up anew for each attempt to commit.
    pub nonce: String,
    /// Nonce of the revision before.
    pub after: String,
    /// The difference to it, see [`crate::desired::store::delta`]; none if it is in parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta: Option<Value>,
    /// Where the difference is, if it is large.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<Parts>,
}

impl Record {
    /// As the rest of lbd knows it.
    pub fn revision(&self, number: u64) -> Revision {
        let (author, message) = (self.author.clone(), self.message.clone());
        Revision { number, author, time_ms: self.time_ms, message }
    }
}

/// Something in pieces.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parts {
    /// Keys begin with `parts/NONCE/`.
    pub nonce: String,
    /// How many there are.
    pub count: u32,
}

/// A whole state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Which.
    pub revision: Revision,
    /// Nonce of its record.
    pub nonce: String,
    /// The state.
    pub desired: Arc<Desired>,
}

/// A lock as it is written down.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Held {
    /// Who holds it.
    pub holder: String,
    /// What for.
    pub reason: String,
    /// Since when, in milliseconds since 1970 UTC.
    pub since_ms: u64,
}

/// A revision with its nonce.
#[derive(Clone, Debug)]
pub struct Known {
    /// Revision and state.
    pub stored: Stored,
    /// Nonce of its record.
    pub nonce: String,
}

impl Known {
    /// As it stands in `head`.
    pub fn head(&self) -> Head {
        Head { number: self.stored.revision.number, nonce: self.nonce.clone() }
    }

    /// Revision 0.
    pub fn zero() -> Self {
        let revision = Revision { number: 0, author: String::new(), time_ms: 0, message: String::new() };
        Self { stored: Stored { revision, desired: Arc::default() }, nonce: String::new() }
    }
}

/// Writes a key.
pub fn put(key: Vec<u8>, value: Vec<u8>, lease: i64) -> RequestOp {
    RequestOp { op: Some(Op::Put(PutRequest { key, value, lease })) }
}

/// Reads a key.
pub fn get(key: Vec<u8>) -> RequestOp {
    RequestOp { op: Some(Op::Range(RangeRequest { key, ..RangeRequest::default() })) }
}

/// Removes the keys from `key` up to but without `end`.
pub fn delete(key: Vec<u8>, end: Vec<u8>) -> RequestOp {
    RequestOp { op: Some(Op::Delete(DeleteRangeRequest { key, range_end: end })) }
}

/// Holds if the key has this value.
pub fn is_value(key: Vec<u8>, value: Vec<u8>) -> Compare {
    let (result, target) = (CompareResult::Equal as i32, CompareTarget::Value as i32);
    Compare { result, target, key, against: Some(Against::Value(value)) }
}

/// Holds if there is no such key.
pub fn is_absent(key: Vec<u8>) -> Compare {
    let (result, target) = (CompareResult::Equal as i32, CompareTarget::Create as i32);
    Compare { result, target, key, against: Some(Against::CreateRevision(0)) }
}

/// Holds if the key is attached to this lease.
pub fn is_leased(key: Vec<u8>, lease: i64) -> Compare {
    let (result, target) = (CompareResult::Equal as i32, CompareTarget::Lease as i32);
    Compare { result, target, key, against: Some(Against::Lease(lease)) }
}

/// Asks for the keys from `key` up to but without `end`, in their order or the other way round.
pub fn range(key: Vec<u8>, end: Vec<u8>, order: SortOrder, limit: i64) -> RangeRequest {
    RangeRequest { key, range_end: end, sort_order: order as i32, limit, ..RangeRequest::default() }
}
