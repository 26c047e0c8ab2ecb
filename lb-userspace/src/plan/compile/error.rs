//! Why a state, or a service, cannot be had.

use crate::desired::model::Name;

/// Why a state cannot be compiled. Nothing has been written when this is returned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompileError {
    /// More of something than a map holds.
    #[error(
        "{what} do not fit: {needed} needed, {limit} possible, first without room: {first}; \
         remove some, or start lbd with a larger {option}"
    )]
    TooMany {
        /// Things counted.
        what: &'static str,
        /// How many are needed.
        needed: u64,
        /// How many fit.
        limit: u64,
        /// The first that has no room.
        first: String,
        /// Option that raises the limit.
        option: &'static str,
    },
    /// A service needs what the program was loaded without.
    #[error(
        "service {service}: {what} needs feature {feature}, which lbd was started without: add it to features"
    )]
    FeatureOff {
        /// Service.
        service: Name,
        /// Setting that needs it.
        what: String,
        /// Feature's name in settings.
        feature: &'static str,
    },
    /// There are deny or allow lists, which the program was loaded without.
    #[error("deny and allow lists need feature guard, which lbd was started without: add it to features")]
    GuardOff,
    /// Tables do not fit.
    #[error(
        "Maglev tables do not fit: {needed} slots needed (with {spare} to write a changed table, with the old one behind it, \
         beside the live one), {limit} possible; the largest is that of service {largest} with {largest_slots} slots: \
         give it a smaller table_size, or start lbd with --max-slots {needed}"
    )]
    TooManySlots {
        /// Slots needed, spare ones included.
        needed: u64,
        /// Slots of the largest table, kept free for a change.
        spare: u64,
        /// Slots that exist.
        limit: u64,
        /// Service with the largest table.
        largest: Name,
        /// Its size.
        largest_slots: u32,
    },
}
