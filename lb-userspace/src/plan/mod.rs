//! Pure decisions: policy, Maglev, compile. No tokio, no aya, no clock, no kernel, no environment.

pub mod compile;
pub mod maglev;
pub mod policy;
