//! Every shipped combination of settings passes the verifier, within its budget.

use lb_common::names;
use test_verifier::{BUDGETS, Budgets, Figures, Plan, decap, ingress, probe, without_frags, write};

fn budgets() -> Budgets {
    Budgets::parse(BUDGETS).unwrap_or_else(|error| panic!("budget.txt: {error:?}"))
}

fn plan() -> Plan {
    Plan::from_env(&budgets()).unwrap_or_else(|error| panic!("{error:?}"))
}

fn check(plan: &Plan, figures: &[Figures]) {
    let (table, wrong) = budgets().compare(&plan.column, figures);
    println!("{table}");
    if write(&budgets(), &plan.column, figures).unwrap_or_else(|error| panic!("{error:?}")) {
        return;
    }
    assert!(
        wrong.is_empty(),
        "{}\nMake the program cheaper, or raise the budget in tests/verifier/budget.txt in the same commit and say why.\n{table}",
        wrong.join("\n")
    );
}

#[test]
fn ingress_with_every_setting() {
    let plan = plan();
    let figures = ingress(&plan).unwrap_or_else(|error| panic!("{error:?}"));
    if std::env::var_os("LB_VERIFIER_ONLY").is_none() && !plan.is_short {
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
    }
    check(&plan, &figures);
}

#[test]
fn decap_with_every_setting() {
    let plan = plan();
    let figures = decap(&plan).unwrap_or_else(|error| panic!("{error:?}"));
    if std::env::var_os("LB_VERIFIER_ONLY").is_none() && !plan.is_short {
        assert_eq!(figures.len(), 8 + names::stage::DECAP_PROGRAMS.len());
    }
    check(&plan, &figures);
}

#[test]
fn probe_programs() {
    let plan = plan();
    let figures = probe(&plan).unwrap_or_else(|error| panic!("{error:?}"));
    check(&plan, &figures);
}

#[test]
fn half_of_what_the_kernel_allows_is_kept_free() {
    assert_eq!(budgets().too_large(), Vec::<&str>::new());
    let over = Budgets::parse("kernel: 6.1 6.18\na: 1 500000\nb: 500001 1\n").expect("a table");
    assert_eq!(over.too_large(), ["b"]);
}

#[test]
fn each_kernel_has_its_budgets() {
    let all =
        Budgets::parse("# comment\nkernel: 6.1 6.12 7.3\ningress x=10: 7 8 9\ningress x=1: 100 110 120\n")
            .expect("a table");
    for (release, column) in [
        ("6.1.0-56-amd64", "6.1"),
        ("6.9.3", "6.1"),
        ("6.12.90+deb12-amd64", "6.12"),
        ("7.3-rc7", "7.3"),
        ("8.0", "7.3"),
    ] {
        assert_eq!(all.column_of(release).expect("a column"), column, "{release}");
    }
    let error = all.column_of("5.15.0-91-generic").expect_err("too old").to_string();
    assert_eq!(error, "5.15.0-91-generic is older than 6.1 6.12 7.3");
    assert_eq!(all.budget("6.12", "ingress x=1"), Some(110));
    assert!(Budgets::parse("kernel: 6.1 6.12\na: 1\n").is_err(), "a number for each kernel");
}

#[test]
fn a_program_over_its_budget_is_named() {
    let figures = |verified| {
        vec![Figures { name: "ingress x=1".into(), verified, translated_bytes: 2, jited_bytes: 3 }]
    };
    let all = Budgets::parse("kernel: 6.1 6.18\ningress x=1: 90 100\n").expect("a table");
    assert_eq!(all.compare("6.18", &figures(100)).1, Vec::<String>::new());
    let (table, wrong) = all.compare("6.18", &figures(101));
    assert!(table.contains("101"), "{table}");
    assert_eq!(
        wrong,
        ["ingress x=1: the verifier of 6.18 walks 101 instructions, 1 more than its budget of 100"]
    );
    assert_eq!(all.compare("6.1", &figures(100)).1.len(), 1);
    let none = Budgets::parse("kernel: 6.1\n").expect("a table");
    assert_eq!(none.compare("6.1", &figures(5)).1, ["ingress x=1: no budget for 6.1; it takes 5"]);
}

#[test]
fn a_measured_column_is_rewritten_with_a_third_more() {
    let figures =
        |name: &str, verified| Figures { name: name.into(), verified, translated_bytes: 2, jited_bytes: 3 };
    let text = "# x: 1\nkernel: 6.1 6.18\na x=1: 1 2\na x=2: 3 4\nb: 5 6\n";
    let all = Budgets::parse(text).expect("a table");
    let rewritten = all.rewrite(text, "6.18", &[figures("a x=2", 3_001), figures("b", 450_000)]);
    assert_eq!(rewritten, "# x: 1\nkernel: 6.1 6.18\na x=1: 1 2\na x=2: 3 4000\nb: 5 500000\n");
}

#[test]
fn programs_without_fragments_are_those_of_plain_sections() {
    let object = b"\0.relxdp.frags\0xdp.frags\0maps\0";
    assert_eq!(without_frags(object), b"\0.relxdp\0frags\0xdp\0frags\0maps\0");
}
