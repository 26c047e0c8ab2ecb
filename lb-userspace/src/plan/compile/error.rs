//! Errors of compiling a state or a service.

use crate::desired::model::Name;

/// Why a state cannot be compiled. Nothing has been written when this is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// A map is too small.
    #[error(
        "{what} do not fit: {needed} needed, {limit} available, first that does not fit: {first}; \
         remove some, or start lbd with a larger {option}"
    )]
    TooMany {
        /// Kind of objects.
        what: &'static str,
        /// Number needed.
        needed: u64,
        /// Number that fits.
        limit: u64,
        /// First object that does not fit.
        first: String,
        /// Option that raises the limit.
        option: &'static str,
    },
    /// A service needs a feature that the program was loaded without.
    #[error(
        "service {service}: {what} needs feature {feature}, which is off: add it to the setting features"
    )]
    FeatureOff {
        /// Service.
        service: Name,
        /// Setting that needs it.
        what: String,
        /// Feature's name in settings.
        feature: &'static str,
    },
    /// There are deny or allow lists, but the program was loaded without them.
    #[error("deny and allow lists need feature guard, which is off: add it to the setting features")]
    GuardOff,
    /// The Maglev tables do not fit.
    #[error(
        "Maglev tables do not fit: {needed} slots needed (including {spare} to write a changed table beside the live \
         one, and to move tables), {limit} available; service {largest} has the largest table with {largest_slots} slots: \
         reduce its table_size, or start lbd with --max-slots {needed}"
    )]
    TooManySlots {
        /// Slots needed, including spare ones.
        needed: u64,
        /// Slots of the largest table, kept free for a change.
        spare: u64,
        /// Slots that exist.
        limit: u64,
        /// Service with the largest table.
        largest: Name,
        /// Slots of that table.
        largest_slots: u32,
    },
}
