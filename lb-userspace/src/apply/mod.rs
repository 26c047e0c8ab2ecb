//! The loop that changes the kernel, and its edge: reconcile, dataplane, announce.

pub mod announce;
pub mod dataplane;
pub mod ethtool;
pub mod link_events;
pub mod objects;
pub mod offloads;
pub mod reconcile;
