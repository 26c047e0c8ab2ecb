//! Features of the loaded program that services need.

use super::{CompileError, DeploymentSettings};
use crate::desired::model::{ForwardingMode, Name, Scheduler, Service, WhenAllDown};
use lb_common::settings::features;

/// Checks that the loaded program supports a service.
pub(super) fn check_features(
    name: &Name,
    wanted: &Service,
    settings: &DeploymentSettings,
) -> Result<(), CompileError> {
    for (bit, what) in program_needs(wanted) {
        if settings.features_off & bit != 0 {
            let feature = features::NAMES.iter().find(|(_, b)| *b == bit).map_or("?", |(name, _)| name);
            return Err(CompileError::FeatureOff { service: name.clone(), what, feature });
        }
    }
    Ok(())
}

/// Features that a service needs, each with the setting that needs it.
pub fn features_needed(wanted: &Service) -> Vec<(u32, String)> {
    let mut needs = program_needs(wanted);
    if !wanted.quic.is_empty() {
        needs.push((features::QUIC, "quic".to_owned()));
    }
    needs
}

/// Features without which the desired state is refused, each with the setting that needs it.
fn program_needs(wanted: &Service) -> Vec<(u32, String)> {
    let needs = [
        (features::NAT, wanted.mode == ForwardingMode::Nat, "mode nat".to_owned()),
        (features::L2, wanted.mode == ForwardingMode::L2, "mode l2".to_owned()),
        (features::LOCAL, wanted.mode == ForwardingMode::Local, "mode local".to_owned()),
        (features::P2C, wanted.scheduler != Scheduler::Maglev, format!("scheduler {:?}", wanted.scheduler)),
        (features::RATE, wanted.limits().flags != 0, "a rate limit of new flows".to_owned()),
        (features::REJECT, wanted.when_all_down == WhenAllDown::Reset, "when_all_down reset".to_owned()),
        // Only an explicit setting needs the feature; the default falls back without it.
        (features::SECOND_CHANCE, wanted.second_chance == Some(true), "second_chance".to_owned()),
    ];
    let needed = needs.into_iter().filter(|(_, is_needed, _)| *is_needed);
    needed.map(|(bit, _, what)| (bit, what.to_lowercase())).collect()
}
