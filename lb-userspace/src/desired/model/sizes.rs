//! Sizes of tables by the number of backends, written into the state when it is changed.
//!
//! Hosts must agree about the size of a table. Older versions give a service without a size 16,381 slots and more, so a
//! smaller default must not be left to each host: `api::Control` writes the size into new services, as an operator
//! would, which every version understands. Services that were made without a size keep that. Pure.
//!
//! A new field for this rule would not do: older hosts refuse unknown fields (`deny_unknown_fields`) and would follow
//! no change at all. A step of size moves no established flow, because the old table is kept for the drain window.

use super::{Desired, Service};
use lb_common::limits;
use std::sync::Arc;

/// Table size for a number of backends: a hundred slots each, in wide steps, because a change of size moves flows.
pub fn by_need(backends: usize) -> u32 {
    let wanted = backends as u64 * u64::from(limits::SLOTS_PER_BACKEND);
    // The smallest size is used only on request.
    let [_, sizes @ .., largest] = limits::TABLE_SIZES;
    let fits = |&size: &u32| u64::from(size) >= wanted;
    sizes.into_iter().find(fits).unwrap_or(largest)
}

/// Slots of a service with so many backends that names no size: it was made by an earlier version, whose rule this is. The
/// three smallest sizes were given only by name.
pub fn by_absence(backends: usize) -> u32 {
    let [.., least, _, _, _, _] = limits::TABLE_SIZES;
    by_need(backends).max(least)
}

impl Service {
    /// Slots of its table as long as it has backends.
    pub fn slots(&self) -> u32 {
        self.table_size.unwrap_or_else(|| by_absence(self.backends.len()))
    }
}

impl Desired {
    /// Writes the size that follows from its absence into each service, for a file: a host that applies a file without
    /// sizes chooses them by need. No table changes.
    pub fn name_sizes(&mut self) {
        for service in self.services.values_mut().filter(|service| service.table_size.is_none()) {
            let slots = service.slots();
            Arc::make_mut(service).table_size = Some(slots);
        }
    }

    /// Gives a size to each new service without one, and a larger one to each service whose table was large enough in `old`
    /// and is too small now. No table shrinks, because backends that come and go would change tables each time; only a size
    /// that is taken back (by a file without one) is computed again.
    pub fn assign_sizes(&mut self, old: &Self) {
        for (name, service) in &mut self.services {
            let before = old.services.get(name);
            if before.is_some_and(|before| Arc::ptr_eq(before, service)) {
                continue;
            }
            let wanted = size(service, before.map(|before| &**before));
            if service.table_size != wanted {
                Arc::make_mut(service).table_size = wanted;
            }
        }
    }
}

fn size(service: &Service, before: Option<&Service>) -> Option<u32> {
    let need = by_need(service.backends.len());
    let Some(before) = before else { return service.table_size.or(Some(need)) };
    match (service.table_size, before.table_size) {
        // Made by an earlier version, which chooses the size at each change.
        (None, None) => None,
        // A file without a size, or the setting was taken back.
        (None, Some(_)) => Some(need),
        (Some(size), Some(had)) if size == had => {
            let was_enough = had >= by_need(before.backends.len());
            Some(if was_enough { size.max(need) } else { size })
        }
        (Some(size), _) => Some(size),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::desired::model::{Backend, Name};

    fn name(text: &str) -> Name {
        text.parse().expect("a name")
    }

    fn state(backends: usize, table_size: Option<u32>) -> Desired {
        let json = r#"{"vip":"10.0.0.1","port":80,"protocol":"tcp"}"#;
        let mut service: Service = serde_json::from_str(json).expect("a service");
        service.table_size = table_size;
        for i in 0..backends {
            let backend: Backend =
                serde_json::from_str(&format!(r#"{{"address":"10.1.{}.{}"}}"#, i / 250, i % 250))
                    .expect("one");
            service.backends.insert(name(&format!("b{i}")), backend);
        }
        let mut desired = Desired::default();
        desired.services.insert(name("s"), service.into());
        desired
    }

    fn assigned(old: &Desired, mut new: Desired) -> Option<u32> {
        new.assign_sizes(old);
        new.services[&name("s")].table_size
    }

    #[test]
    fn sizes_by_need() {
        let sizes = [0, 1, 10, 11, 40, 41, 163, 164, 655, 656].map(by_need);
        assert_eq!(sizes, [1_021, 1_021, 1_021, 4_093, 4_093, 16_381, 16_381, 65_537, 65_537, 131_071]);
        assert_eq!(by_need(1_000_000), 524_287);
    }

    #[test]
    fn new_services_get_a_size_that_grows_with_them() {
        let none = Desired::default();
        assert_eq!(assigned(&none, state(3, None)), Some(1_021));
        assert_eq!(assigned(&none, state(3, Some(251))), Some(251), "asked for");
        assert_eq!(assigned(&state(10, Some(1_021)), state(11, Some(1_021))), Some(4_093));
        assert_eq!(
            assigned(&state(11, Some(4_093)), state(10, Some(4_093))),
            Some(4_093),
            "it does not shrink"
        );
        assert_eq!(assigned(&state(10, Some(4_093)), state(60, Some(4_093))), Some(16_381));
        assert_eq!(assigned(&state(20, Some(1_021)), state(21, Some(1_021))), Some(1_021), "small by choice");
        assert_eq!(assigned(&state(3, Some(1_021)), state(3, Some(251))), Some(251), "changed by hand");
    }

    #[test]
    fn services_of_earlier_versions_stay_as_they_are() {
        assert_eq!(assigned(&state(3, None), state(4, None)), None);
        let old = state(3, None);
        assert_eq!(assigned(&old, old.clone()), None);
    }

    #[test]
    fn an_absent_size_is_that_of_earlier_versions() {
        let sizes = [0, 1, 10, 11, 163, 164, 655, 656, 1_310, 1_311, 1_000_000].map(by_absence);
        let expected =
            [16_381, 16_381, 16_381, 16_381, 16_381, 65_537, 65_537, 131_071, 131_071, 262_139, 524_287];
        assert_eq!(sizes, expected);
    }

    /// Named, it is the same for any number of backends, on a host that has the service already and on one that has not.
    #[test]
    fn naming_an_absent_size_changes_no_table() {
        for backends in [0, 1, 10, 11, 40, 41, 163, 164, 700] {
            let old = state(backends, None);
            let mut named = old.clone();
            named.name_sizes();
            for there in
                [old.clone(), Desired::default(), state(3, Some(1_021)), state(backends, Some(16_381))]
            {
                let size = assigned(&there, named.clone());
                assert_eq!(size, Some(old.services[&name("s")].slots()), "{backends}");
            }
        }
    }

    /// A file without sizes changes nothing when it is applied again.
    #[test]
    fn a_file_that_names_no_size_changes_none() {
        for (had, backends, expect) in [
            (1_021, 3, 1_021),
            (4_093, 10, 1_021),
            (4_093, 11, 4_093),
            (65_537, 3, 1_021),
            (1_021, 30, 4_093),
        ] {
            let old = state(backends, Some(had));
            assert_eq!(assigned(&old, state(backends, None)), Some(expect), "{had} for {backends}");
            assert_eq!(assigned(&state(backends, Some(expect)), state(backends, None)), Some(expect));
        }
    }
}
