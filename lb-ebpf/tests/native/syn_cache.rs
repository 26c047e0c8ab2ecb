//! A line of the SYN cache and of the flow filter, against models.

use lb_common::note::{self, LINES, Line, WAYS};
use lb_ebpf::select::syn_cache::{FilterLine, NOT_FOUND, SynLine, expect, find, forget, insert, may_hold};
use proptest::prelude::*;
use std::{cell::Cell, collections::BTreeSet};

#[derive(Default)]
struct Native(Cell<Line>);

impl Native {
    fn change(&self, f: impl FnOnce(&mut Line)) {
        let mut line = self.0.get();
        f(&mut line);
        self.0.set(line);
    }
}

impl SynLine for Native {
    fn head(&self, way: usize) -> u64 {
        self.0.get().heads[way]
    }
    fn sequence(&self, way: usize) -> u32 {
        self.0.get().sequences[way]
    }
    fn set_head(&self, way: usize, head: u64) {
        self.change(|line| line.heads[way] = head);
    }
    fn set_sequence(&self, way: usize, sequence: u32) {
        self.change(|line| line.sequences[way] = sequence);
    }
}

impl FilterLine for Native {
    fn settled(&self) -> (u64, u32) {
        (self.0.get().settled, self.0.get().settled_too)
    }
    fn recent(&self) -> [u16; 2] {
        self.0.get().recent
    }
    fn set_recent(&self, is_first: bool, bits: u16) {
        self.change(|line| line.recent[usize::from(!is_first)] = bits);
    }
}

/// Marks of one line that differ in their tags.
fn mark(tag: u32) -> u64 {
    u64::from(tag + 1) << 32 | u64::from(7 % LINES)
}

fn placed(line: &Native, tag: u32, now_s: u32) -> Option<(u32, u32)> {
    let found = find(line, mark(tag), now_s);
    (found != NOT_FOUND).then(|| (note::backend(found & 0xffff_ffff), (found >> 32) as u32))
}

proptest! {
    #[test]
    fn a_line_keeps_the_last_flows_of_different_seconds(tags in prop::collection::vec(0_u32..8, 1..60)) {
        let line = Native::default();
        // Newest last; an entry that is written again becomes the newest.
        let mut model: Vec<(u32, u32)> = Vec::new();
        for (step, &tag) in (0_u32..).zip(&tags) {
            let now_s = 1_000 + step;
            insert(&line, mark(tag), tag + 10, step, now_s);
            model.retain(|(t, _)| *t != tag);
            model.push((tag, step));
            if model.len() > WAYS {
                model.remove(0);
            }
            for other in 0..8 {
                let known = model.iter().find(|(t, _)| *t == other);
                prop_assert_eq!(placed(&line, other, now_s), known.map(|(t, step)| (t + 10, *step)));
            }
        }
        for tag in 0..8 {
            forget(&line, mark(tag));
            prop_assert_eq!(placed(&line, tag, 2_000), None);
        }
    }

    #[test]
    fn the_filter_holds_every_flow_of_both_epochs(flows in prop::collection::vec((any::<u32>(), 0_u32..2), 0..40)) {
        let line = Native::default();
        let mut held = BTreeSet::new();
        for (bits, epoch) in flows {
            let mark = u64::from(bits) << 12 | 7;
            expect(&line, epoch, mark);
            held.insert(mark);
            prop_assert!(held.iter().all(|mark| may_hold(&line, *mark)));
        }
    }
}

#[test]
fn an_empty_line_holds_nothing() {
    let line = Native::default();
    assert!(!may_hold(&line, mark(3)));
    assert_eq!(find(&line, mark(3), 5), NOT_FOUND);
}
