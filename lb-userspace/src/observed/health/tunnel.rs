//! The way of traffic for probes: marks, and programs on the interfaces that probes leave by.
//!
//! Input: a backend's address and how traffic gets there. Output: the mark for the probe's socket, once everything is
//! in place for it. Called for each such probe; set up by the daemon.
//!
//! Answers are told apart by the host's port, so such a socket binds a port of its own. No policy rule, route or
//! `accept_local` is needed; a socket connected to the VIP would need all three once the host announces the VIP,
//! because the address is local then. A host that cannot load the programs probes directly and says so: it must not
//! find dead what it cannot look through.

use crate::{
    desired::model::{ForwardingMode, Service, Via},
    observed::neighbour::netlink::Kernel,
};
use lb_common::{
    Be16,
    backend::mode,
    probe::{MARK, MARK_BITS, ProbeWay},
};
use std::{collections::BTreeMap, net::IpAddr};
use tokio::sync::{Mutex, OnceCell};

/// How a service's traffic gets to its backends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Through {
    /// Destination of the inner packet.
    pub vip: IpAddr,
    /// One of `lb_common::backend::mode`.
    pub mode: u8,
    /// Destination port of GUE.
    pub gue_port: u16,
}

impl Through {
    /// What a service asks for; None where its probes go directly.
    pub fn of(service: &Service) -> Option<Self> {
        let mode = match service.mode {
            ForwardingMode::Ipip => mode::IPIP,
            ForwardingMode::Gue => mode::GUE,
            ForwardingMode::L2 => mode::L2,
            ForwardingMode::Nat | ForwardingMode::Local => return None,
        };
        let tunnel = service.health.via == Via::Tunnel;
        tunnel.then_some(Self { vip: service.vip, mode, gue_port: service.gue_port })
    }
}

/// The packet programs that put a marked probe on the way of traffic.
pub trait ProbePrograms: Send {
    /// Attaches the programs to an interface, once.
    ///
    /// # Errors
    /// The interface does not exist, or the kernel cannot attach them.
    fn attach(&mut self, ifindex: u32) -> Result<(), String>;
    /// Sets what becomes of probes with a mark.
    ///
    /// # Errors
    /// The map is full.
    fn set_way(&mut self, mark: u32, way: ProbeWay) -> Result<(), String>;
}

/// Loads the programs.
pub type LoadPrograms = Box<dyn Fn() -> Result<Box<dyn ProbePrograms>, String> + Send + Sync>;

/// Puts probes on the way of traffic.
pub struct Tunnel {
    load: LoadPrograms,
    /// Interfaces on which traffic arrives: answers may too.
    attached: Box<dyn Fn() -> Vec<u32> + Send + Sync>,
    /// Why it cannot, or what it takes; found out by the first probe that asks.
    ready: OnceCell<Result<Ready, String>>,
}

struct Ready {
    kernel: Kernel,
    inner: Mutex<Inner>,
}

struct Inner {
    programs: Box<dyn ProbePrograms>,
    marks: BTreeMap<Through, u32>,
}

impl Tunnel {
    /// Loads nothing yet.
    pub fn new(load: LoadPrograms, attached: impl Fn() -> Vec<u32> + Send + Sync + 'static) -> Self {
        Self { load, attached: Box::new(attached), ready: OnceCell::new() }
    }

    async fn ready(&self) -> Result<&Ready, String> {
        let ready = self.ready.get_or_init(|| async {
            let load = || -> Result<Ready, String> {
                let mut programs = (self.load)()?;
                for ifindex in (self.attached)() {
                    programs.attach(ifindex)?;
                }
                let (kernel, _) = Kernel::open().map_err(|e| e.to_string())?;
                let inner = Mutex::new(Inner { programs, marks: BTreeMap::new() });
                Ok(Ready { kernel, inner })
            };
            let ready = load();
            if let Err(error) = &ready {
                tracing::error!(error, "health checks cannot take the tunnel, and go directly");
            }
            ready
        });
        ready.await.as_ref().map_err(Clone::clone)
    }

    /// Sees to it that probes of a backend take the way of traffic, and gives their mark.
    ///
    /// # Errors
    /// This host cannot do that, in words.
    pub async fn prepare(&self, backend: IpAddr, through: Through) -> Result<u32, String> {
        let ready = self.ready().await?;
        // Routes change: the interface may be another than a second ago.
        let route = ready.kernel.route(backend).await?;
        let mut inner = ready.inner.lock().await;
        for ifindex in (self.attached)().into_iter().chain([route.ifindex]) {
            inner.programs.attach(ifindex)?;
        }
        if let Some(mark) = inner.marks.get(&through) {
            return Ok(*mark);
        }
        let way = ProbeWay {
            vip: to_address(through.vip),
            gue_port: Be16::new(through.gue_port),
            mode: through.mode,
            pad: 0,
        };
        let number = inner.marks.len() as u32 + 1;
        if number >> MARK_BITS != 0 {
            return Err("there are more kinds of tunnels than marks".to_owned());
        }
        let mark = MARK | number;
        inner.programs.set_way(mark, way)?;
        inner.marks.insert(through, mark);
        Ok(mark)
    }
}

pub(super) fn to_address(ip: IpAddr) -> lb_common::Address {
    match ip {
        IpAddr::V4(v4) => lb_common::mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}
