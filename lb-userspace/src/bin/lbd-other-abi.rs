//! `lbd` of another ABI version, for tests of upgrades; nothing that is shipped has it.

fn main() -> std::process::ExitCode {
    lb_userspace::lbd::command::main()
}
