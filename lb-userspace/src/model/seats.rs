//! Seats: numbers that backends keep, from which tables are built.
//!
//! Pure. `api::Control` gives seats to each state before it is stored; `compile` reads them; `lbctl config diff`
//! compares states that have them. A state without (from an older store) is read as if it had been
//! given them in name order.

use super::{Backend, Desired, Name, Service};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

impl Desired {
    /// Gives a seat to each backend without one: the one it has in `old`, by its name or else its address,
    /// unless that is taken; or the lowest free one, in name order.
    pub fn assign_seats(&mut self, old: &Self) {
        for (name, service) in &mut self.services {
            if service.backends.values().any(|b| b.seat.is_none()) {
                let id = (service.vip, service.port, service.protocol);
                let same = |s: &&Arc<Service>| (s.vip, s.port, s.protocol) == id;
                let service = Arc::make_mut(service);
                let before = old.services.get(name).or_else(|| old.services.values().find(same));
                if let Some(before) = before {
                    service.keep_seats(before);
                }
                let seats = service.seats();
                service.backends.values_mut().zip(seats).for_each(|(b, seat)| b.seat = Some(seat));
            }
        }
    }
}

impl Service {
    /// The backends' seats, in name order: those given, and for the others the lowest free ones.
    pub fn seats(&self) -> Vec<u32> {
        let taken: BTreeSet<u32> = self.backends.values().filter_map(|b| b.seat).collect();
        let mut free = (0..).filter(|seat| !taken.contains(seat));
        self.backends.values().map(|b| b.seat.unwrap_or_else(|| free.next().unwrap_or(u32::MAX))).collect()
    }

    fn keep_seats(&mut self, old: &Self) {
        let mut taken: BTreeSet<u32> = self.backends.values().filter_map(|b| b.seat).collect();
        let known: Vec<(&Name, &Backend, u32)> =
            old.backends.iter().zip(old.seats()).map(|((name, b), seat)| (name, b, seat)).collect();
        let by_name: BTreeMap<_, _> = known.iter().map(|&(name, _, seat)| (name, seat)).collect();
        let by_address: BTreeMap<_, _> = known.iter().map(|&(_, b, seat)| (b.address, seat)).collect();
        for (name, backend) in &mut self.backends {
            backend.seat = backend.seat.or(by_name.get(name).copied().filter(|&seat| taken.insert(seat)));
        }
        for backend in self.backends.values_mut() {
            let seat = || by_address.get(&backend.address).copied().filter(|&seat| taken.insert(seat));
            backend.seat = backend.seat.or_else(seat);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(backends: &[(&str, u8, Option<u32>)]) -> Desired {
        let mut service: Service =
            serde_json::from_value(serde_json::json!({"vip": "10.0.0.1", "port": 80, "protocol": "tcp"}))
                .unwrap();
        for &(name, address, seat) in backends {
            let address = std::net::Ipv4Addr::new(10, 1, 0, address);
            let backend = serde_json::json!({"address": address, "seat": seat});
            service.backends.insert(name.parse().unwrap(), serde_json::from_value(backend).unwrap());
        }
        Desired { services: [("web".parse().unwrap(), Arc::new(service))].into() }
    }

    fn seats(desired: &Desired) -> Vec<Option<u32>> {
        desired.services.values().flat_map(|s| s.backends.values().map(|b| b.seat)).collect()
    }

    #[test]
    fn a_fresh_state_is_seated_in_name_order_around_what_is_given() {
        let mut fresh = state(&[("a", 1, None), ("b", 2, Some(1)), ("c", 3, None)]);
        fresh.assign_seats(&Desired::default());
        assert_eq!(seats(&fresh), [Some(0), Some(1), Some(2)]);
    }

    #[test]
    fn seats_are_kept_by_name_then_by_address_and_holes_are_filled() {
        let mut old = state(&[("b", 1, None), ("c", 2, None), ("d", 3, None), ("e", 4, None)]);
        old.assign_seats(&Desired::default());
        // b gone, c stays, d renamed to x, a and y new.
        let mut new =
            state(&[("a", 9, None), ("c", 2, None), ("e", 4, None), ("x", 3, None), ("y", 8, None)]);
        new.assign_seats(&old);
        assert_eq!(seats(&new), [Some(0), Some(1), Some(3), Some(2), Some(4)]);
        // A state of an older store counts as seated in name order.
        let mut again = state(&[("a", 9, None), ("b", 1, None)]);
        again.assign_seats(&state(&[("b", 1, None), ("c", 2, None)]));
        assert_eq!(seats(&again), [Some(1), Some(0)]);
    }

    #[test]
    fn a_seat_that_another_was_given_is_not_kept() {
        let mut old = state(&[("a", 1, None), ("b", 2, None)]);
        old.assign_seats(&Desired::default());
        let mut new = state(&[("a", 1, None), ("b", 2, Some(0))]);
        new.assign_seats(&old);
        assert_eq!(seats(&new), [Some(1), Some(0)]);
    }
}
