//! State of the connection to etcd, as it is published; and acceptance by an operator.

use super::{EtcdInner, StoreError, keys::Head, locked, retire::refusal};
use crate::clock;

impl EtcdInner {
    /// Whether an operator accepted exactly this head.
    pub(super) fn is_accepted(&self, head: &Head) -> bool {
        locked(&self.accepted).as_ref() == Some(head)
    }

    /// Records that the store holds something older than revision `seen`, so that it can be accepted.
    pub(super) fn set_back(&self, head: Head, seen: u64) -> StoreError {
        let found = head.number;
        *locked(&self.set_back) = Some(head);
        StoreError::SetBack { store: self.place.clone(), found, seen }
    }

    /// Records the value of the key `moved`; none if there is no such key.
    pub(super) fn set_moved(&self, value: Option<&[u8]>) {
        let moved = match value.map(|value| refusal(self, value)) {
            Some(StoreError::Moved { to, .. }) => Some(to),
            // While the data are copied, the store is in use.
            _ => None,
        };
        let is_new = self.link.send_if_modified(|link| {
            let is_other = link.moved != moved;
            link.moved = moved;
            is_other
        });
        if is_new && let Some(refusal) = self.link.borrow().refusal() {
            tracing::warn!("{refusal}");
        }
    }

    /// Records that etcd answers.
    pub(super) fn set_connected(&self) {
        let now = clock::unix_ms();
        let mut was_cut = None;
        *locked(&self.set_back) = None;
        self.link.send_modify(|link| {
            link.contact_ms = now;
            if !link.connected {
                was_cut = Some(now.saturating_sub(link.since_ms));
                link.connected = true;
                link.since_ms = now;
                link.problem = None;
                link.set_back = None;
            }
        });
        if let Some(ms) = was_cut {
            let revision = self.head.borrow().revision.number;
            tracing::info!(store = self.place, revision, after_ms = ms, "connected to the store");
            self.published_changed.notify_one();
        }
    }

    /// Records that etcd does not answer, or not as it should.
    pub(super) fn set_disconnected(&self, error: &StoreError) {
        let problem = match error {
            StoreError::CutOff { what, .. } => what.clone(),
            other => other.to_string(),
        };
        let set_back = match error {
            StoreError::SetBack { found, .. } => Some(*found),
            _ => {
                // A head that cannot be read now may have changed when it can.
                *locked(&self.set_back) = None;
                *locked(&self.accepted) = None;
                None
            }
        };
        let changed = self.link.send_if_modified(|link| {
            let changed = link.connected || link.problem.as_ref() != Some(&problem);
            link.set_back = set_back;
            if link.connected {
                link.since_ms = clock::unix_ms();
            }
            let was_connected = link.connected;
            link.connected = false;
            link.problem = Some(problem.clone());
            changed && was_connected
        });
        if changed {
            let revision = self.head.borrow().revision.number;
            tracing::error!(
                store = self.place,
                problem,
                revision,
                "cut off from the store; forwarding goes on"
            );
        }
    }
}
