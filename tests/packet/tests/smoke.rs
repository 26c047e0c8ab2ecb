//! Both programs load.
use lb_common::settings::*;
#[test]
fn loads() {
    for level in [0, 5] {
        let i = test_packet::Ingress::load_with(IngressSettings::DEFAULT, level)
            .map_err(|e| {
                eprintln!("{e:?}");
            })
            .unwrap();
        let info = i.program().info().unwrap();
        eprintln!(
            "ingress level {level}: {:?} insns verified, jited {} xlated {:?}",
            info.verified_instruction_count(),
            info.size_jitted(),
            info.size_translated()
        );
        let d = test_packet::Decap::load_with(DecapSettings::DEFAULT, level, &[], &[]).unwrap();
        let info = d.program().info().unwrap();
        eprintln!(
            "decap level {level}: {:?} insns verified, jited {} xlated {:?}",
            info.verified_instruction_count(),
            info.size_jitted(),
            info.size_translated()
        );
    }
}
