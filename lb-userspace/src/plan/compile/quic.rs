//! QUIC-LB: compiles configurations and server ids.

use super::{Plan, ServiceMemory};
use crate::desired::model::Service;
use lb_common::quic::{QuicConfig, SERVER_ID_MAX, ServerIdKey, config_key};

/// Adds a service's configs and its backends' server ids. Removed backends that drain are not found by connection id
/// any more; their flows are found by their 5-tuple.
pub fn add_configs(wanted: &Service, memory: &ServiceMemory, plan: &mut Plan) {
    for config in &wanted.quic {
        let entry = QuicConfig {
            server_id_len: config.server_id_bytes,
            nonce_len: config.nonce_bytes,
            keyed: config.key.is_some().into(),
            pad: 0,
            keys: lb_ebpf::quic::aes::expand(config.key.unwrap_or_default()),
        };
        plan.quic_configs.insert(config_key(memory.index, config.id), entry);
    }
    if wanted.quic.is_empty() {
        return;
    }
    for backend in wanted.backends.values() {
        let (Some(server_id), Some(known)) = (&backend.server_id, memory.backends.get(&backend.address))
        else {
            continue;
        };
        let bytes = server_id.as_bytes();
        let mut id = [0; SERVER_ID_MAX];
        id[..bytes.len()].copy_from_slice(bytes);
        let key = ServerIdKey { service: memory.index, id, len: bytes.len() as u8 };
        plan.quic_servers.insert(key, known.index);
    }
}
