//! The list of revisions, of all changes or of those that concern one service.

use super::{EtcdInner, locked, proto::SortOrder};
use crate::desired::{
    model::Name,
    store::{Revision, ServiceHistory, StoreError},
};

/// Records in one request.
const PAGE: usize = 500;

impl EtcdInner {
    pub(super) async fn history(
        &self,
        before: Option<u64>,
        limit: usize,
    ) -> Result<Vec<Revision>, StoreError> {
        let newest = self.head.borrow().revision.number;
        let end = before.unwrap_or(u64::MAX).min(newest + 1);
        let begin = self.oldest(newest).max(1);
        let (recent, complete) = {
            let recent = locked(&self.recent);
            let numbers = recent.range(begin..end.max(begin)).rev().take(limit);
            let found: Vec<Revision> = numbers.map(|(_, known)| known.stored.revision.clone()).collect();
            let wanted = limit.min(end.saturating_sub(begin) as usize);
            let complete = found.len() == wanted && found.first().is_none_or(|r| r.number + 1 == end);
            (found, complete)
        };
        // Without a connection, the revisions in memory are better than none.
        if complete || !self.link.borrow().connected {
            return Ok(recent);
        }
        let (mut found, mut end) = (Vec::new(), self.keys.revision(end));
        while found.len() < limit {
            let page = (limit - found.len()).min(PAGE);
            let answer = self.range(self.keys.revision(begin), end.clone(), SortOrder::Descend, page).await;
            let answer = answer.map_err(|e| self.call_failed(e))?;
            for kv in &answer.kvs {
                let (number, record) = self.record(kv)?;
                found.push(record.revision(number));
            }
            match answer.kvs.last() {
                Some(last) if answer.more => end = last.key.clone(),
                _ => break,
            }
        }
        Ok(found)
    }
    /// Revisions that changed a service, among the newest `scan` below `before`.
    pub(super) async fn history_of(
        &self,
        service: &Name,
        before: Option<u64>,
        scan: usize,
    ) -> Result<ServiceHistory, StoreError> {
        self.ensure_connected()?;
        let newest = self.head.borrow().revision.number;
        let (begin, mut end) = (self.oldest(newest).max(1), before.unwrap_or(u64::MAX).min(newest + 1));
        let (mut found, mut looked) = (Vec::new(), 0);
        while looked < scan {
            let page = (scan - looked).min(PAGE);
            let to = self.keys.revision(end);
            let answer = self.range(self.keys.revision(begin), to, SortOrder::Descend, page).await;
            let answer = answer.map_err(|e| self.call_failed(e))?;
            looked += answer.kvs.len();
            for kv in &answer.kvs {
                let (number, record) = self.record(kv)?;
                end = number;
                let (delta, _) = self.delta(number, &record).await?;
                if delta["services"].get(service.as_str()).is_some() {
                    found.push(record.revision(number));
                }
            }
            if !answer.more || answer.kvs.is_empty() {
                return Ok((found, None));
            }
        }
        Ok((found, Some(end)))
    }
}
