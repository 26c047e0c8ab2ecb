//! `lbctl`: see `lb_userspace::lbctl::commands`.

fn main() -> std::process::ExitCode {
    lb_userspace::lbctl::commands::main()
}
