//! Hosts as members: the claim of a name, and records that outlive their hosts.
//!
//! A host claims its name with a key under its lease, whose value is the host's instance: an id in its state directory
//! and its machine's boot id. A process of the same instance takes the key over at once, so that a restart does not wait
//! for the lease of the process before it; any other instance waits until the lease has ended.

use super::{
    CallError, EtcdInner, StoreError, TXN,
    keys::{delete, get, is_absent, is_value, put},
    locked,
    proto::{OpResponse, TxnRequest, TxnResponse},
    session::CALL,
};
use crate::desired::store::{HOSTS, MEMBERS};

impl EtcdInner {
    /// Claims this host's name under a lease; false if another live host has it. True before this host joins.
    pub(super) async fn claim_name(&self, lease: i64) -> Result<bool, CallError> {
        let Some((name, instance)) = locked(&self.joined).clone() else { return Ok(true) };
        let key = self.keys.key(&format!("leased/names/{name}"));
        let claim = put(key.clone(), instance.clone().into_bytes(), lease);
        let mut is_mine = false;
        for compare in [is_value(key.clone(), instance.into_bytes()), is_absent(key.clone())] {
            let (compare, success) = (vec![compare], vec![claim.clone()]);
            let request = TxnRequest { compare, success, failure: vec![get(key.clone())] };
            let answer: TxnResponse = self.client.call(TXN, &request, CALL).await?;
            is_mine |= answer.succeeded;
            if is_mine {
                break;
            }
        }
        self.set_name_taken((!is_mine).then_some(name));
        Ok(is_mine)
    }

    fn set_name_taken(&self, name: Option<String>) {
        let is_new = self.link.send_if_modified(|link| {
            let is_other = link.name_taken != name;
            link.name_taken.clone_from(&name);
            is_other
        });
        match name.filter(|_| is_new) {
            Some(host) => tracing::error!(
                host,
                "another live host has this host's name: this host publishes nothing until the name is free; give \
                 each host a name of its own (--host)"
            ),
            None if is_new => tracing::info!("this host's name is free now, and claimed"),
            None => {}
        }
    }

    /// Writes this host's member record, if it differs from what was sent.
    pub(super) async fn send_member(&self, sent: &mut Option<(String, Vec<u8>)>) -> Result<(), CallError> {
        let wanted = locked(&self.member).clone();
        if let Some((name, value)) = wanted.as_ref().filter(|_| wanted != *sent) {
            let success = vec![put(self.keys.key(&format!("{MEMBERS}{name}")), value.clone(), 0)];
            let request = TxnRequest { success, ..TxnRequest::default() };
            let _: TxnResponse = self.client.call(TXN, &request, CALL).await?;
            *sent = wanted;
        }
        Ok(())
    }
}

/// Removes the record of a member that is not live.
pub(super) async fn forget(inner: &EtcdInner, name: String) -> Result<(), StoreError> {
    inner.ensure_connected()?;
    let live = inner.keys.key(&format!("leased/{HOSTS}{name}"));
    let request = TxnRequest {
        compare: vec![is_absent(live)],
        success: vec![delete(inner.keys.key(&format!("{MEMBERS}{name}")), Vec::new())],
        failure: Vec::new(),
    };
    let answer: Result<TxnResponse, CallError> = inner.client.call(TXN, &request, CALL).await;
    let answer = answer.map_err(|e| inner.call_failed(e))?;
    match answer.responses.first().and_then(|r| r.op.as_ref()) {
        _ if !answer.succeeded => Err(StoreError::MemberLives { name }),
        Some(OpResponse::Delete(delete)) if delete.deleted > 0 => Ok(()),
        _ => Err(StoreError::NoMember { name }),
    }
}
