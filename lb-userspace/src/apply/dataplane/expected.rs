//! Compares what lbd attached with what the kernel shows: what to repair, and what to report. Pure: `waiting` gathers the
//! facts and carries the decision out.

use super::seen::SeenInterface;
use std::collections::BTreeSet;

/// A pinned link of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OurLink {
    /// Index of its interface, in whichever network namespace that is now.
    pub ifindex: u32,
    /// Id of the program under it.
    pub program: u32,
}

/// Facts about one configured interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Index of the interface that the program was last seen on under the configured name.
    pub attached_to: Option<u32>,
    /// The interface that has the configured name now.
    pub named: Option<SeenInterface>,
    /// The interface that has the index `attached_to` now.
    pub indexed: Option<SeenInterface>,
    /// Our pinned links to the indices of the two.
    pub links: Vec<OurLink>,
    /// Programs that lbd of any ABI version has pinned.
    pub ours: BTreeSet<u32>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The program runs.
    Nothing,
    /// Attach the program to the interface with this index, which has no link of ours.
    Attach(u32),
    /// Put our program back under our link to the interface with this index.
    Update(u32),
    /// There is no interface to attach to.
    Wait(Absence),
}

/// Why an interface is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Absence {
    /// The program has never run on an interface with this name.
    NeverSeen,
    /// It was deleted.
    Gone,
    /// It has moved to another network namespace, with the program.
    Moved,
}

/// What is wrong with an interface that the program runs on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LinkTrouble {
    /// An administrator has set it down.
    Down,
    /// Up, without a carrier.
    NoCarrier,
    /// It has another name.
    Renamed {
        /// Its name.
        now: String,
    },
}

impl LinkTrouble {
    /// The trouble of the interface with this name, as a sentence with advice.
    pub fn sentence(&self, name: &str) -> String {
        match self {
            Self::Down => format!("interface {name} is down: `ip link set dev {name} up`"),
            Self::NoCarrier => format!(
                "interface {name} has no carrier: check cable, switch port and `ip link show dev {name}`"
            ),
            Self::Renamed { now } => format!(
                "interface {name} is now named {now}: the program still runs on it. Set --iface {now} before the next start \
                 of lbd, or rename the interface back"
            ),
        }
    }
}

/// Decides about one interface.
pub fn decide(facts: &Facts) -> (Action, Option<LinkTrouble>) {
    let Some(named) = &facts.named else { return decide_without(facts) };
    let trouble = match (named.is_up, named.has_carrier) {
        (false, _) => Some(LinkTrouble::Down),
        (true, false) => Some(LinkTrouble::NoCarrier),
        (true, true) => None,
    };
    let action = match link_on(facts, named) {
        None => Action::Attach(named.ifindex),
        Some(link) if facts.ours.contains(&link.program) => Action::Nothing,
        Some(_) => Action::Update(named.ifindex),
    };
    (action, trouble)
}

/// Decides where no interface has the configured name.
fn decide_without(facts: &Facts) -> (Action, Option<LinkTrouble>) {
    if let Some(seen) = &facts.indexed
        && let Some(link) = link_on(facts, seen)
    {
        let action =
            if facts.ours.contains(&link.program) { Action::Nothing } else { Action::Update(seen.ifindex) };
        return (action, Some(LinkTrouble::Renamed { now: seen.name.clone() }));
    }
    let absence = match facts.attached_to {
        None => Absence::NeverSeen,
        // The link is of an interface that exists, but not here.
        Some(ifindex) if facts.links.iter().any(|link| link.ifindex == ifindex) => Absence::Moved,
        Some(_) => Absence::Gone,
    };
    (Action::Wait(absence), None)
}

/// Our link to an interface, if the program under the link runs on it, or one of ours that it is just replacing. Where none
/// does, the link belongs to an interface with the same index in another network namespace.
fn link_on(facts: &Facts, seen: &SeenInterface) -> Option<OurLink> {
    let is_on =
        |link: &OurLink| seen.programs.contains(&link.program) || !seen.programs.is_disjoint(&facts.ours);
    let runs = |link: &&OurLink| link.ifindex == seen.ifindex && is_on(link);
    facts.links.iter().find(runs).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: u32 = 40;
    const OTHER: u32 = 77;

    fn seen(ifindex: u32, name: &str, programs: &[u32]) -> SeenInterface {
        let programs = programs.iter().copied().collect();
        SeenInterface { ifindex, name: name.to_owned(), is_up: true, has_carrier: true, programs }
    }

    /// Attached to eth0 with index 5, and well.
    fn well() -> Facts {
        Facts {
            attached_to: Some(5),
            named: Some(seen(5, "eth0", &[OURS])),
            indexed: Some(seen(5, "eth0", &[OURS])),
            links: vec![OurLink { ifindex: 5, program: OURS }],
            ours: [OURS, OURS + 1].into(),
        }
    }

    #[test]
    fn a_running_program_is_left_alone() {
        assert_eq!(decide(&well()), (Action::Nothing, None));
        let next = Facts { links: vec![OurLink { ifindex: 5, program: OURS + 1 }], ..well() };
        let next = Facts { named: Some(seen(5, "eth0", &[OURS + 1])), ..next };
        assert_eq!(decide(&next), (Action::Nothing, None), "a program that is being replaced");
    }

    #[test]
    fn what_can_be_repaired_is() {
        let detached =
            Facts { named: Some(seen(5, "eth0", &[])), indexed: Some(seen(5, "eth0", &[])), ..well() };
        let no_link = Facts { links: Vec::new(), ..detached.clone() };
        assert_eq!(decide(&no_link), (Action::Attach(5), None), "somebody detached the link");
        let recreated = Facts { named: Some(seen(9, "eth0", &[])), indexed: None, ..well() };
        assert_eq!(decide(&recreated), (Action::Attach(9), None));
        assert_eq!(decide(&detached), (Action::Attach(5), None), "same index, but the link is elsewhere");
        let replaced = Facts {
            named: Some(seen(5, "eth0", &[OTHER])),
            links: vec![OurLink { ifindex: 5, program: OTHER }],
            ..well()
        };
        assert_eq!(decide(&replaced), (Action::Update(5), None), "another program under our link");
        let taken = Facts { named: Some(seen(5, "eth0", &[OTHER])), links: Vec::new(), ..well() };
        assert_eq!(decide(&taken).0, Action::Attach(5), "the attempt says who has it");
    }

    #[test]
    fn what_cannot_be_repaired_is_named() {
        let without = |facts: Facts| Facts { named: None, ..facts };
        let gone = without(Facts { indexed: None, links: Vec::new(), ..well() });
        assert_eq!(decide(&gone), (Action::Wait(Absence::Gone), None));
        let moved = without(Facts { indexed: None, ..well() });
        assert_eq!(decide(&moved), (Action::Wait(Absence::Moved), None));
        let strangers = without(Facts { indexed: Some(seen(5, "eth7", &[])), ..well() });
        assert_eq!(decide(&strangers), (Action::Wait(Absence::Moved), None), "the index is another's now");
        let renamed = without(Facts { indexed: Some(seen(5, "lan0", &[OURS])), ..well() });
        assert_eq!(
            decide(&renamed),
            (Action::Nothing, Some(LinkTrouble::Renamed { now: "lan0".to_owned() }))
        );
        let never = Facts { ours: [OURS].into(), ..Facts::default() };
        assert_eq!(decide(&never), (Action::Wait(Absence::NeverSeen), None), "it has never been there");
        let mut down = well();
        let named = down.named.as_mut().expect("it exists");
        named.has_carrier = false;
        assert_eq!(decide(&down), (Action::Nothing, Some(LinkTrouble::NoCarrier)));
        down.named.as_mut().expect("it exists").is_up = false;
        assert_eq!(decide(&down), (Action::Nothing, Some(LinkTrouble::Down)));
        let sentence = LinkTrouble::Down.sentence("eth0");
        assert_eq!(sentence, "interface eth0 is down: `ip link set dev eth0 up`");
    }
}
