//! From a changed desired state to the maps, through the reconciler, over maps in memory: 100 services with 100
//! backends each, one backend changed at a time. Prints percentiles of the time to the answer and to the end.
#![allow(missing_docs)]

use lb_common::{
    Backend, BackendStats, Service, ServiceKey, ServiceView, Slot, Vip, VipKey, limits,
    quic::{QuicConfig, ServerIdKey},
};
use lb_userspace::{
    apply::{
        dataplane::DataplaneError,
        reconcile::{Event, Maps, Reconciler},
    },
    clock,
    desired::model::{self, Desired, Name},
    plan::compile::{Cost, DeploymentSettings},
};
use std::{
    collections::BTreeMap,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Arrays as the kernel has them, without a kernel.
struct Memory {
    keys: BTreeMap<ServiceKey, u32>,
    vips: BTreeMap<VipKey, Vip>,
    services: Vec<Service>,
    slots: Vec<Slot>,
    backends: Vec<Backend>,
    costs: BTreeMap<u32, Cost>,
}

type Result<T> = std::result::Result<T, DataplaneError>;

impl Maps for Memory {
    fn sizes(&self) -> (u32, u32, u32) {
        (limits::SERVICES, limits::SLOTS, limits::BACKENDS)
    }
    fn keys(&self) -> Result<Vec<(ServiceKey, u32)>> {
        Ok(self.keys.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn vips(&self) -> Result<Vec<(VipKey, Vip)>> {
        Ok(self.vips.iter().map(|(k, v)| (*k, *v)).collect())
    }
    fn service(&self, index: u32) -> Option<Service> {
        self.services.get(index as usize).copied()
    }
    fn slots(&self, base: u32, count: u32) -> Vec<Slot> {
        self.slots[base as usize..(base + count) as usize].to_vec()
    }
    fn backend(&self, index: u32) -> Option<Backend> {
        self.backends.get(index as usize).copied()
    }
    fn cost(&self, index: u32) -> Cost {
        self.costs.get(&index).copied().unwrap_or_default()
    }
    fn set_cost(&mut self, index: u32, cost: Cost) -> Result<()> {
        self.costs.insert(index, cost);
        Ok(())
    }
    fn clear_load(&mut self, _index: u32) -> Result<()> {
        Ok(())
    }
    fn report_flows(&self, _index: u32, _flows: u64) {}
    fn backend_stats(&self, _index: u32) -> BackendStats {
        BackendStats::default()
    }
    fn write_slots(&mut self, base: u32, slots: &[Slot]) -> Result<()> {
        self.slots[base as usize..base as usize + slots.len()].copy_from_slice(slots);
        Ok(())
    }
    fn rewrite_slots(&mut self, slots: &[(u32, Slot)]) -> Result<()> {
        slots.iter().for_each(|(place, slot)| self.slots[*place as usize] = *slot);
        Ok(())
    }
    fn grace_period(&mut self) {}
    fn write_view(&mut self, index: u32, view: u32, value: &ServiceView) -> Result<()> {
        self.services[index as usize].views[view as usize] = *value;
        Ok(())
    }
    fn set_active(&mut self, index: u32, view: u32) -> Result<()> {
        self.services[index as usize].active = view;
        Ok(())
    }
    fn set_used(&mut self, index: u32, used: bool) -> Result<()> {
        self.services[index as usize].used = used.into();
        Ok(())
    }
    fn write_backends(&mut self, backends: &[(u32, Backend)]) -> Result<()> {
        for (index, backend) in backends {
            self.backends[*index as usize] = *backend;
        }
        Ok(())
    }
    fn clear_stats(&mut self, _index: u32) -> Result<()> {
        Ok(())
    }
    fn set_key(&mut self, key: &ServiceKey, service: Option<u32>) -> Result<()> {
        match service {
            Some(index) => drop(self.keys.insert(*key, index)),
            None => drop(self.keys.remove(key)),
        }
        Ok(())
    }
    // No service here is for QUIC.
    fn quic_configs(&self) -> Result<Vec<(u32, QuicConfig)>> {
        Ok(Vec::new())
    }
    fn quic_servers(&self) -> Result<Vec<(ServerIdKey, u32)>> {
        Ok(Vec::new())
    }
    fn set_quic_config(&mut self, _: u32, _: Option<&QuicConfig>) -> Result<()> {
        Ok(())
    }
    fn set_quic_server(&mut self, _: &ServerIdKey, _: Option<u32>) -> Result<()> {
        Ok(())
    }
    fn set_vip(&mut self, key: &VipKey, vip: Option<&Vip>) -> Result<()> {
        match vip {
            Some(vip) => drop(self.vips.insert(*key, *vip)),
            None => drop(self.vips.remove(key)),
        }
        Ok(())
    }
    fn set_egress(&mut self, _ifindex: u32, _allowed: bool) -> Result<()> {
        Ok(())
    }
}

fn name(prefix: &str, i: u32) -> Name {
    format!("{prefix}{i}").parse().expect("a letter and digits")
}

fn backend(service: u32, i: u32) -> model::Backend {
    let address = Ipv4Addr::from(0x0a10_0000 + service * 256 + i);
    serde_json::from_value(serde_json::json!({ "address": address, "weight": 1 + i % 7 })).expect("valid")
}

fn desired() -> Desired {
    let service = |s: u32| -> model::Service {
        let vip = Ipv4Addr::from(0x0a00_0100 + s);
        let json = serde_json::json!({ "vip": vip, "port": 80, "protocol": "tcp" });
        let mut service: model::Service = serde_json::from_value(json).expect("valid");
        service.backends = (0..100).map(|i| (name("b", i), backend(s, i))).collect();
        service
    };
    Desired { services: (0..100).map(|s| (name("s", s), service(s).into())).collect(), ..Desired::default() }
}

/// Time of this thread on a processor: what the machine's other work does not disturb.
fn processor_time() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).expect("always there");
    Duration::new(time.tv_sec() as u64, time.tv_nsec() as u32)
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    println!("{what:32} p50 {:9.1?}  p99 {:9.1?}  max {:9.1?}", at(50), at(99), at(100));
}

fn main() {
    let maps = Memory {
        keys: BTreeMap::new(),
        vips: BTreeMap::new(),
        services: vec![Service::default(); limits::SERVICES as usize],
        slots: vec![Slot::EMPTY; limits::SLOTS as usize],
        backends: vec![Backend::default(); limits::BACKENDS as usize],
        costs: BTreeMap::new(),
    };
    let (mut reconciler, published) =
        Reconciler::new(maps, DeploymentSettings::default(), None, Box::new(|_| ())).expect("maps in memory");
    let mut state = desired();
    let mut change = |state: &Desired, revision| {
        let (applied, mut answer) = oneshot::channel();
        let event = Event::Desired { desired: Arc::new(state.clone()), revision, applied: Some(applied) };
        let (began, processor) = (Instant::now(), processor_time());
        reconciler.step(vec![event], clock::boot());
        let (took, busy) = (began.elapsed(), processor_time() - processor);
        let applied = answer.try_recv().expect("answered").expect("fits");
        (applied.took, took, busy)
    };
    let (_, _, busy) = change(&state, 1);
    println!("all anew: {busy:.1?} of processor time");
    let (mut answered, mut whole, mut busy) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..300 {
        let service = state.service_mut(&name("s", i * 37 % 100)).expect("one of the hundred");
        let weight = &mut service.backends.get_mut(&name("b", i % 100)).expect("a hundred").weight;
        *weight = *weight % 9 + 1;
        let (a, w, b) = change(&state, u64::from(i) + 2);
        answered.push(a);
        whole.push(w);
        busy.push(b);
    }
    print("to the maps", answered);
    print("to the end of the step", whole);
    print("processor time of the step", busy);
    assert_eq!(published.borrow().services.len(), 100);
}
