//! API of the deny and allow lists.
//!
//! Input: requests. Output: JSON of the types below. A change of a list is one revision and applies entirely or
//! not at all; it also removes expired entries. Called by `routes`.

use super::{
    ApiError,
    access::Writer,
    control::SharedControl,
    routes::{Params, Reply, body},
    types::{Change, WriteQuery},
};
use crate::{
    clock,
    desired::model::{
        Desired, ListName,
        guard::{List, normal, parse, stands},
    },
};
use axum::{
    Json,
    body::Bytes,
    extract::{Path, State},
};
use ipnet::IpNet;
use lb_common::Reason;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// Entries listed by default.
const ENTRIES: usize = 1_000;
/// Largest number of invalid entries that an error lists.
const WRONG: usize = 20;

/// `GET /v1/guard`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardInfo {
    /// Entries of the deny list.
    pub deny: usize,
    /// Entries of the allow list.
    pub allow: usize,
    /// Capacity of both lists together.
    pub limit: u64,
    /// Packets dropped because their source is denied.
    pub dropped: u64,
    /// New flows dropped by the rate limit of their source.
    pub rate_source: u64,
    /// New flows dropped by the rate limit of their service.
    pub rate_service: u64,
    /// New flows placed by hash alone because their service was under flood or a table was full.
    pub flood: u64,
}

/// An entry of a guard list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryInfo {
    /// Prefix.
    pub prefix: IpNet,
    /// Seconds until the entry expires; none if it does not expire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_s: Option<u64>,
}

/// `GET /v1/guard/{list}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entries {
    /// Number of entries on the list.
    pub total: usize,
    /// Selected entries.
    pub entries: Vec<EntryInfo>,
}

/// Body of `POST /v1/guard/{list}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListChange {
    /// Prefixes to add.
    #[serde(default)]
    pub add: Vec<String>,
    /// Prefixes to remove.
    #[serde(default)]
    pub remove: Vec<String>,
    /// Whether to remove all other entries.
    #[serde(default)]
    pub replace: bool,
    /// Seconds until the added entries expire; none if they do not expire.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_s: Option<u64>,
}

/// `GET /v1/guard/check`: the entry that matches an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardDecision {
    /// The address.
    pub address: IpAddr,
    /// Whether its packets are dropped.
    pub denied: bool,
    /// List of the matching entry; none if no entry matches.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub list: Option<ListName>,
    /// The matching entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<EntryInfo>,
}

fn parse_list(text: &str) -> Result<ListName, ApiError> {
    ListName::ALL.into_iter().find(|list| list.label() == text).ok_or_else(|| {
        ApiError::not_found(format!("{text:?} is not a guard list")).fix("the guard lists are deny and allow")
    })
}

fn entry_info(prefix: IpNet, until: u64, now_s: u64) -> EntryInfo {
    EntryInfo { prefix, left_s: (until != 0).then(|| until.saturating_sub(now_s)) }
}

pub(super) async fn show(State(control): SharedControl) -> Reply<GuardInfo> {
    let counters = control.read_engine(|engine| engine.counters()).await?;
    let guard = &control.head().desired.guard;
    let snapshot = control.engine().snapshot();
    let limit = snapshot.room.iter().find(|room| room.what == "guard entries").map_or(0, |room| room.limit);
    Ok(Json(GuardInfo {
        deny: guard.deny.len(),
        allow: guard.allow.len(),
        limit,
        dropped: counters.reason(Reason::GuardDenied),
        rate_source: counters.reason(Reason::RateSource),
        rate_service: counters.reason(Reason::RateService),
        flood: counters.reason(Reason::FlowFlood),
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckQuery {
    address: IpAddr,
}

pub(super) async fn check(
    State(control): SharedControl,
    Params(query): Params<CheckQuery>,
) -> Reply<GuardDecision> {
    let now_s = clock::unix().as_secs();
    let address = query.address.to_canonical();
    let found = control.head().desired.guard.deciding_entry(address, now_s);
    Ok(Json(GuardDecision {
        address,
        denied: matches!(found, Some((ListName::Deny, ..))),
        list: found.map(|(list, ..)| list),
        entry: found.map(|(_, net, until)| entry_info(net, until, now_s)),
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct EntriesQuery {
    limit: Option<usize>,
    within: Option<IpNet>,
}

pub(super) async fn entries(
    State(control): SharedControl,
    Path(list): Path<String>,
    Params(query): Params<EntriesQuery>,
) -> Reply<Entries> {
    let desired = control.head().desired;
    let list = desired.guard.list(parse_list(&list)?);
    let now_s = clock::unix().as_secs();
    let within = query.within.map(normal);
    let entries = list
        .iter()
        .filter(|(net, until)| {
            stands(*until, now_s) && within.is_none_or(|within| within.contains(net) || net.contains(&within))
        })
        .take(query.limit.unwrap_or(ENTRIES))
        .map(|(net, until)| entry_info(net, until, now_s))
        .collect();
    Ok(Json(Entries { total: list.len(), entries }))
}

/// Parses prefixes; the error lists the invalid ones with their positions.
fn parse_prefixes(texts: &[String]) -> Result<Vec<IpNet>, ApiError> {
    let (mut nets, mut wrong) = (Vec::with_capacity(texts.len()), Vec::new());
    for (i, text) in texts.iter().enumerate() {
        match parse(text) {
            Ok(net) => nets.push(net),
            Err(what) => wrong.push(format!("entry {}: {what}", i + 1)),
        }
    }
    if wrong.is_empty() {
        return Ok(nets);
    }
    let count = wrong.len();
    wrong.truncate(WRONG);
    let mut error = ApiError::bad_request(format!("{count} entries are not valid; nothing has changed"));
    error.details = wrong;
    Err(error)
}

pub(super) async fn change(
    State(control): SharedControl,
    Path(list): Path<String>,
    Params(query): Params<WriteQuery>,
    Writer(author): Writer,
    bytes: Bytes,
) -> Reply<Change> {
    let name = parse_list(&list)?;
    let change: ListChange = body(&bytes)?;
    drop(bytes);
    if change.for_s == Some(0) {
        return Err(ApiError::bad_request(
            "for_s is 0, must be at least 1; omit it for an entry that does not expire",
        ));
    }
    let now_s = clock::unix().as_secs();
    let until = change.for_s.map_or(0, |for_s| now_s.saturating_add(for_s));
    let (add, remove) = (parse_prefixes(&change.add)?, parse_prefixes(&change.remove)?);
    let write = |desired: &mut Desired| {
        let now_s = clock::unix().as_secs();
        for name in ListName::ALL {
            desired.guard.list_mut(name).expire(now_s);
        }
        let list = desired.guard.list_mut(name);
        let missing: Vec<String> =
            remove.iter().filter(|net| !list.remove(**net)).map(ToString::to_string).collect();
        if !missing.is_empty() {
            let mut error = ApiError::not_found(format!(
                "{} of these entries are not on the {} list; nothing has changed",
                missing.len(),
                name.label()
            ))
            .fix(format!(
                "`lbctl guard {} list` shows the entries; remove an entry by the prefix that was added",
                name.label()
            ));
            error.details = missing.into_iter().take(WRONG).collect();
            return Err(error);
        }
        if change.replace {
            *list = List::default();
        }
        for net in &add {
            list.insert(*net, until);
        }
        Ok(())
    };
    Ok(Json(control.write(&author, &query, write).await?))
}
