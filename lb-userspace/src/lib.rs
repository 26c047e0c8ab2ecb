//! The control plane of the balancer: everything behind `lbd` and `lbctl`.
//!
//! Rooms from top to bottom; each imports only those below it (`cargo xtask rooms` shows how): [`lbctl`], the command
//! line; [`lbd`], the daemon; [`serve`], the API; [`apply`], the maps and programs of the kernel; [`observed`], what is
//! measured; [`plan`], which is pure (no clock, no I/O): policies, Maglev, contents of the maps; [`desired`], the model,
//! the settings and the store.

pub mod apply;
pub mod blocking;
pub mod clock;
pub mod desired;
pub mod histogram;
pub mod lbctl;
pub mod lbd;
pub mod observed;
pub mod plan;
pub mod printable;
pub mod serve;

/// Where `lbd` listens, and `lbctl` looks for it, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/lb/lbd.sock";
