//! `lbd`: see `lb_userspace::daemon` and `lb_userspace::worker`.

fn main() -> std::process::ExitCode {
    lb_userspace::daemon::command::main()
}
