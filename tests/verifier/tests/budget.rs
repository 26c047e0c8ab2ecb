//! Every shipped combination of settings passes the verifier, within its budget.

use lb_common::names;
use test_verifier::{Figures, budget, compare, decap, ingress, probe};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/budget.txt");
/// The kernel gives up here (BPF_COMPLEXITY_LIMIT_INSNS).
const KERNEL_LIMIT: u32 = 1_000_000;

fn check(figures: Vec<Figures>) {
    let file = std::fs::read_to_string(FILE).expect("budget.txt lies beside the tests");
    let (table, wrong) = compare(&file, &figures);
    println!("{table}");
    assert!(
        wrong.is_empty(),
        "{}\nMake the program cheaper, or raise the budget in tests/verifier/budget.txt in the same commit and say why.\n{table}",
        wrong.join("\n")
    );
    assert!(
        figures.iter().all(|f| f.verified < KERNEL_LIMIT / 2),
        "half of what the kernel allows is kept free"
    );
}

#[test]
fn ingress_with_every_setting() {
    let figures = ingress().unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(figures.len(), 32 * (1 + names::stage::INGRESS_PROGRAMS.len()));
    // What is switched off is not there any more.
    let jited = |name: &str| figures.iter().find(|f| f.name == name).expect("loaded").jited_bytes;
    let all = jited("ingress ipv6=1 vlan=1 stats=1 icmp=1 log=0");
    for less in [
        "ingress ipv6=0 vlan=1 stats=1 icmp=1 log=0",
        "ingress ipv6=1 vlan=0 stats=1 icmp=1 log=0",
        "ingress ipv6=1 vlan=1 stats=0 icmp=1 log=0",
        "ingress ipv6=1 vlan=1 stats=1 icmp=0 log=0",
    ] {
        assert!(jited(less) < all, "{less}: {} bytes, with everything on {all}", jited(less));
    }
    assert!(all < jited("ingress ipv6=1 vlan=1 stats=1 icmp=1 log=5"), "logging off costs nothing");
    check(figures);
}

#[test]
fn decap_with_every_setting() {
    let figures = decap().unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(figures.len(), 8 + names::stage::DECAP_PROGRAMS.len());
    check(figures);
}

#[test]
fn probe_programs() {
    let figures = probe().unwrap_or_else(|error| panic!("{error:?}"));
    assert_eq!(figures.len(), 2);
    check(figures);
}

#[test]
fn a_program_over_its_budget_is_named() {
    let figures = |verified| {
        vec![Figures { name: "ingress x=1".into(), verified, translated_bytes: 2, jited_bytes: 3 }]
    };
    let file = "# comment\ningress x=10: 7\ningress x=1: 100\n";
    assert_eq!(budget(file, "ingress x=1"), Some(100));
    assert_eq!(compare(file, &figures(100)).1, Vec::<String>::new());
    let (table, wrong) = compare(file, &figures(101));
    assert!(table.contains("101"), "{table}");
    assert_eq!(wrong, ["ingress x=1: the verifier walks 101 instructions, 1 more than its budget of 100"]);
    assert_eq!(compare("", &figures(5)).1, ["ingress x=1: no budget; it takes 5"]);
}
