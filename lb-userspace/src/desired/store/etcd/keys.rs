//! Keys of the store, and their values.
//!
//! All keys begin with the prefix and a slash:
//!
//! | key | value |
//! |---|---|
//! | `store` | [`StoreIdentity`]: id of the data |
//! | `head` | [`Head`]: the newest revision; the only key that every commit compares and changes |
//! | `revisions/N` | [`RevisionRecord`]: change of revision N |
//! | `snapshots/N` | [`ValueParts`] of a [`StoredSnapshot`]: the complete state at N |
//! | `parts/NONCE/I` | a part of a value that is too large for one request |
//! | `moved` | address that the data were migrated to, if any |
//! | `leased/KEY` | a value that a host publishes, under its lease |
//! | `leased/names/NAME` | instance of the host that has a name, under its lease |
//! | `members/NAME` | a host's record, which stays until it is removed |
//! | `locks/NAME` | [`LockValue`], under a lease of its own |
//!
//! Revisions are written once and never changed, so reads are consistent during writes.

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

/// Version of this layout. Increased when an older lbd could no longer read it.
pub const FORMAT: u64 = 1;

/// Names of keys under a prefix.
#[derive(Clone, Debug)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// Keys under this prefix.
    pub fn new(prefix: &str) -> Self {
        Self { prefix: prefix.to_owned() }
    }

    /// Returns a key, or the common prefix of several.
    pub fn key(&self, name: &str) -> Vec<u8> {
        format!("{}/{name}", self.prefix).into_bytes()
    }

    /// Returns a key without the prefix.
    pub fn plain(&self, key: &[u8]) -> Option<String> {
        self.after("", key).map(str::to_owned)
    }

    /// Returns the key of revision `n`; the numbers sort as text.
    pub fn revision(&self, n: u64) -> Vec<u8> {
        self.key(&format!("revisions/{n:020}"))
    }

    /// Returns the key of the snapshot at `n`.
    pub fn snapshot(&self, n: u64) -> Vec<u8> {
        self.key(&format!("snapshots/{n:020}"))
    }

    /// Returns the rest of a key after the given name.
    pub fn after<'k>(&self, name: &str, key: &'k [u8]) -> Option<&'k str> {
        std::str::from_utf8(key).ok()?.strip_prefix(&self.prefix)?.strip_prefix('/')?.strip_prefix(name)
    }
}

/// Returns the first key after all that begin with `key`.
pub fn end_of(key: &[u8]) -> Vec<u8> {
    let mut end = key.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

/// Identity of the data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreIdentity {
    /// [`FORMAT`] of the writer.
    pub format: u64,
    /// Id, 16 hexadecimal digits.
    pub id: String,
}

/// The newest revision: its number, and the nonce of its record, which tells two different histories with the same
/// numbers apart.
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

/// Record of a revision.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RevisionRecord {
    /// Author of the change.
    pub author: String,
    /// Time of the change, in milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// Reason for the change, or what changed.
    pub message: String,
    /// What changed, if the message is the author's reason. Absent in records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<String>,
    /// Random, generated for each attempt to commit.
    pub nonce: String,
    /// Nonce of the previous revision.
    pub after: String,
    /// Difference to the previous state, see [`crate::desired::store::delta`]; none if it is in parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delta: Option<Value>,
    /// Parts of a large difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parts: Option<ValueParts>,
}

impl RevisionRecord {
    /// Converts the record.
    pub fn revision(&self, number: u64) -> Revision {
        let (author, message, summary) = (self.author.clone(), self.message.clone(), self.summary.clone());
        Revision { number, author, time_ms: self.time_ms, message, summary }
    }
}

/// A value in parts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ValueParts {
    /// The keys begin with `parts/NONCE/`.
    pub nonce: String,
    /// Number of parts.
    pub count: u32,
}

/// A complete state.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StoredSnapshot {
    /// Number, author, time and message.
    pub revision: Revision,
    /// Nonce of the revision's record.
    pub nonce: String,
    /// The state.
    pub desired: Arc<Desired>,
}

/// Stored form of a lock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LockValue {
    /// Holder of the lock.
    pub holder: String,
    /// Reason for the lock.
    pub reason: String,
    /// Start, in milliseconds since 1970 UTC.
    pub since_ms: u64,
}

/// A revision with its nonce.
#[derive(Clone, Debug)]
pub struct KnownRevision {
    /// Revision and state.
    pub stored: Stored,
    /// Nonce of the revision's record.
    pub nonce: String,
}

impl KnownRevision {
    /// Returns the revision's entry in `head`.
    pub fn head(&self) -> Head {
        Head { number: self.stored.revision.number, nonce: self.nonce.clone() }
    }

    /// Revision 0.
    pub fn zero() -> Self {
        let revision =
            Revision { number: 0, author: String::new(), time_ms: 0, message: String::new(), summary: None };
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

/// Removes the keys from `key` up to, but not including, `end`.
pub fn delete(key: Vec<u8>, end: Vec<u8>) -> RequestOp {
    RequestOp { op: Some(Op::Delete(DeleteRangeRequest { key, range_end: end })) }
}

/// Holds if the key has this value.
pub fn is_value(key: Vec<u8>, value: Vec<u8>) -> Compare {
    let (result, target) = (CompareResult::Equal as i32, CompareTarget::Value as i32);
    Compare { result, target, key, against: Some(Against::Value(value)) }
}

/// Holds if the key does not exist.
pub fn is_absent(key: Vec<u8>) -> Compare {
    let (result, target) = (CompareResult::Equal as i32, CompareTarget::Create as i32);
    Compare { result, target, key, against: Some(Against::CreateRevision(0)) }
}

/// Holds if the key is attached to this lease.
pub fn is_leased(key: Vec<u8>, lease: i64) -> Compare {
    let (result, target) = (CompareResult::Equal as i32, CompareTarget::Lease as i32);
    Compare { result, target, key, against: Some(Against::Lease(lease)) }
}

/// Reads the keys from `key` up to, but not including, `end`, in the given order.
pub fn range(key: Vec<u8>, end: Vec<u8>, order: SortOrder, limit: i64) -> RangeRequest {
    RangeRequest { key, range_end: end, sort_order: order as i32, limit, ..RangeRequest::default() }
}
