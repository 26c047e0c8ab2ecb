//! Seats: stable numbers of backends, and the order in which they were taken and left; tables are built from both.
//!
//! Pure. `api::Control` assigns seats to each state before it is stored; `compile` reads them; `lbctl config diff`
//! compares states that have them. A state without seats (from an older store) is read as if they had been
//! assigned in name order.
//!
//! A backend that comes after one of its weight has left takes that one's place, so replacements add no history.
//! After 1,024 turns more than backends the history begins anew.

use super::{Backend, Desired, Name, Service};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// Number of seats of one service, free ones included: a table refers to members by 16 bits, and the highest value means none.
pub const MAX_SEATS: u32 = u16::MAX as u32 - 1;
/// Largest weight.
const MAX_WEIGHT: u32 = 65_535;
/// Turns that a service's seating may have beyond one per backend. A longer seating is rebuilt in the order of seats,
/// which moves most slots once. Backends that replace each other add no turns.
const SPARE_TURNS: usize = 1_024;

impl Desired {
    /// Assigns a seat to each backend without one: its seat in `old`, by name or else by address, unless that is taken;
    /// otherwise the seat left last, or the lowest free one, in name order. Updates each service's
    /// seating.
    pub fn assign_seats(&mut self, old: &Self) {
        for (name, service) in &mut self.services {
            let id = (service.vip, service.port, service.protocol);
            let same = |s: &&Arc<Service>| (s.vip, s.port, s.protocol) == id;
            let before = old.services.get(name).or_else(|| old.services.values().find(same));
            if before.is_some_and(|before| Arc::ptr_eq(before, service)) && !service.seating.is_empty() {
                continue;
            }
            let service = Arc::make_mut(service);
            if let Some(before) = before {
                if service.seating.is_empty() {
                    service.seating = before.seating();
                }
                service.keep_seats(before);
            }
            let seats = service.seats();
            service.backends.values_mut().zip(seats).for_each(|(b, seat)| b.seat = Some(seat));
            service.seating = service.seating();
        }
    }
}

impl Service {
    /// Seats of the backends, in name order: the given ones; for the others the seats left last, then the lowest
    /// free ones.
    pub fn seats(&self) -> Vec<u32> {
        let taken: BTreeSet<u32> = self.backends.values().filter_map(|b| b.seat).collect();
        let left: Vec<u32> = self.seating.iter().rev().take_while(|turn| turn.1 == 0).map(|t| t.0).collect();
        let lowest = (0..).filter(|seat| !left.contains(seat));
        let mut free = left.iter().copied().chain(lowest).filter(|seat| !taken.contains(seat));
        self.backends.values().map(|b| b.seat.unwrap_or_else(|| free.next().unwrap_or(u32::MAX))).collect()
    }

    /// The seating, completed by the turns in which present backends came and earlier ones left.
    pub fn seating(&self) -> Vec<(u32, u32)> {
        let present: BTreeMap<u32, u32> =
            self.seats().into_iter().zip(self.backends.values().map(|b| b.weight.min(MAX_WEIGHT))).collect();
        let mut turns = self.seating.clone();
        let mut seated = BTreeMap::new();
        for &(seat, weight) in &turns {
            seated.insert(seat, weight);
        }
        for (&seat, _) in
            seated.iter().rev().filter(|(seat, weight)| **weight > 0 && !present.contains_key(seat))
        {
            leave(&mut turns, seat);
        }
        for (&seat, &weight) in present.iter().filter(|(_, weight)| **weight > 0) {
            match seated.get(&seat) {
                None | Some(0) => come(&mut turns, seat, weight),
                // The seat is the newest, so a new weight of it moves only the difference.
                Some(_) if turns.last().is_some_and(|turn| turn.0 == seat) => {
                    turns.last_mut().into_iter().for_each(|turn| turn.1 = weight);
                }
                Some(_) => {}
            }
        }
        if turns.len() > present.len() + SPARE_TURNS {
            turns = present.into_iter().filter(|(_, weight)| *weight > 0).collect();
        }
        turns
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

/// Weight of a seat after these turns.
fn weight_of(turns: &[(u32, u32)], seat: u32) -> u32 {
    turns.iter().rev().find(|turn| turn.0 == seat).map_or(0, |turn| turn.1)
}

/// Adds a turn in which a seat is left, or removes the turn in which it was taken.
fn leave(turns: &mut Vec<(u32, u32)>, seat: u32) {
    while turns.pop_if(|turn| turn.0 == seat).is_some() {}
    if weight_of(turns, seat) > 0 {
        turns.push((seat, 0));
    }
}

/// Adds a turn in which a seat is taken, or removes the turn in which it was left.
fn come(turns: &mut Vec<(u32, u32)>, seat: u32, weight: u32) {
    let left = turns.pop_if(|turn| turn.0 == seat);
    if weight_of(turns, seat) != weight {
        turns.extend(left);
        turns.push((seat, weight));
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
        Desired { services: [("web".parse().unwrap(), Arc::new(service))].into(), ..Desired::default() }
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

    fn seating(desired: &Desired) -> &[(u32, u32)] {
        &desired.services.values().next().unwrap().seating
    }

    #[test]
    fn who_comes_after_somebody_left_takes_the_place_back() {
        let mut first = state(&[("a", 1, None), ("b", 2, None), ("c", 3, None)]);
        first.assign_seats(&Desired::default());
        assert_eq!(seating(&first), [(0, 1), (1, 1), (2, 1)]);
        let mut fewer = state(&[("b", 2, None), ("c", 3, None)]);
        fewer.assign_seats(&first);
        assert_eq!(seating(&fewer), [(0, 1), (1, 1), (2, 1), (0, 0)]);
        let mut other = state(&[("b", 2, None), ("c", 3, None), ("d", 4, None)]);
        other.assign_seats(&fewer);
        assert_eq!((seats(&other), seating(&other)), (vec![Some(1), Some(2), Some(0)], seating(&first)));
        // The newest leaves without a trace, and two others in one step.
        let mut last = state(&[("b", 2, None), ("d", 4, None)]);
        last.assign_seats(&other);
        assert_eq!(seating(&last), [(0, 1), (1, 1)]);
        let mut none = state(&[]);
        none.assign_seats(&last);
        assert_eq!(seating(&none), []);
    }

    #[test]
    fn weights_of_now_are_no_turns_but_of_the_newest() {
        let mut first = state(&[("a", 1, None), ("b", 2, None)]);
        first.assign_seats(&Desired::default());
        for (name, expected) in [("a", [(0, 1), (1, 1)]), ("b", [(0, 1), (1, 7)])] {
            let mut heavier = first.clone();
            let web = heavier.service_mut(&"web".parse().unwrap()).unwrap();
            web.backends.get_mut(&name.parse::<Name>().unwrap()).unwrap().weight = 7;
            heavier.assign_seats(&first);
            assert_eq!(seating(&heavier), expected);
        }
    }

    #[test]
    fn a_seating_does_not_grow_for_ever() {
        let mut now = state(&[("a", 1, None), ("b", 2, None), ("c", 3, None)]);
        now.assign_seats(&Desired::default());
        for i in 0..5_000u32 {
            let mut next = now.clone();
            let service = next.service_mut(&"web".parse().unwrap()).unwrap();
            let which: Name = ["a", "b"][i as usize % 2].parse().unwrap();
            let mut backend = service.backends.remove(&which).unwrap();
            backend.seat = None;
            let mut without = next.clone();
            without.assign_seats(&now);
            backend.weight = 1 + i % 7;
            without.service_mut(&"web".parse().unwrap()).unwrap().backends.insert(which, backend);
            let before = without.clone();
            without.assign_seats(&before);
            now = without;
            assert!(seating(&now).len() <= 3 + SPARE_TURNS);
        }
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
