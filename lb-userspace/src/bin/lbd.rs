//! `lbd`: see `lb_userspace::lbd` and `lb_userspace::lbd::worker`.

fn main() -> std::process::ExitCode {
    lb_userspace::lbd::command::main()
}
