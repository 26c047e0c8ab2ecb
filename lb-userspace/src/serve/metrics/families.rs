//! One scrape of a daemon's metrics, family by family.

use super::encoder::{Encoder, is_worker_reason, reason_sample};
use crate::{
    apply::announce::VipState,
    clock,
    desired::model::Health,
    observed::health::ObstacleKind,
    serve::api::{Control, Engine},
};
use lb_common::Reason;
use prometheus_client::encoding::DescriptorEncoder;
use std::{
    fmt,
    sync::{Arc, PoisonError},
};

/// One scrape: the counters were read, the rest is read while encoding.
pub(super) struct Scrape {
    pub(super) control: Arc<Control>,
    pub(super) counters: crate::serve::api::engine::Counters,
}

impl fmt::Debug for Scrape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scrape")
    }
}

impl prometheus_client::collector::Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Encoder(encoder);
        self.daemon(&mut out)?;
        self.hooks(&mut out)?;
        self.services(&mut out)?;
        self.backends(&mut out)?;
        self.all_probes(&mut out)?;
        self.held(&mut out)?;
        self.probes(&mut out)?;
        self.replicas(&mut out)?;
        self.regions(&mut out)
    }
}

impl Scrape {
    /// Which programs were loaded, and what the kernel supports.
    fn loaded(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let loaded = self.control.engine().loaded();
        let attached = self.control.engine().interfaces();
        let is_attached = attached.iter().map(|i| (i.name.as_str(), 1.0));
        let is_attached = is_attached.chain(loaded.waiting.iter().map(|w| (w.name.as_str(), 0.0)));
        out.gauges(
            "lb_interface_attached",
            "Whether the program is attached to the configured interface",
            is_attached.map(|(name, is)| ([("interface", name)], is)),
        )?;
        let has_problem = attached
            .iter()
            .map(|i| ([("interface", i.name.as_str())], f64::from(u8::from(i.problem.is_some()))));
        out.gauges(
            "lb_interface_problem",
            "Whether an interface that the program is attached to is down, has no carrier, or was renamed",
            has_problem,
        )?;
        let waiting = loaded.waiting.iter().map(|w| ([("interface", w.name.as_str())], 1.0));
        out.gauges(
            "lb_interface_waiting",
            "Configured interfaces that the program is not attached to yet",
            waiting,
        )?;
        let left_out = loaded.left_out.iter();
        let left_out =
            left_out.map(|l| ([("program", l.program.as_str()), ("feature", l.feature.as_str())], 1.0));
        out.gauges("lb_program_left_out", "Programs that the kernel refused to load", left_out)?;
        let kernel =
            loaded.kernel.iter().map(|(name, has)| ([("feature", name.as_str())], f64::from(u8::from(*has))));
        out.gauges("lb_kernel_feature", "Whether the kernel has the feature, as probed at start", kernel)
    }

    /// Programs that hooks start for events.
    fn hooks(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let hooks = self.control.events().hooks.lock().unwrap_or_else(PoisonError::into_inner);
        let runs = hooks.iter().enumerate().flat_map(|(i, (program, counts))| {
            let number = (i + 1).to_string();
            let labels = move |result: &str| {
                [("hook", number.clone()), ("program", program.clone()), ("result", result.to_owned())]
            };
            counts.by_result().map(|(result, n)| (labels(result), n))
        });
        out.counters(
            "lb_hook_runs",
            "Programs that hooks started for events, by result; missed: events that came faster than the programs ended",
            runs,
        )
    }

    fn daemon(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let engine: &dyn Engine = &**self.control.engine();
        let (snapshot, head) = (engine.snapshot(), self.control.head());
        let info =
            [("version", env!("CARGO_PKG_VERSION").to_owned()), ("abi", lb_common::ABI_VERSION.to_string())];
        out.gauges(
            "lb_build_info",
            "Version of lbd and ABI version of its maps",
            std::iter::once((info, 1.0)),
        )?;
        let interfaces = engine.interfaces();
        let interfaces =
            interfaces.iter().map(|i| ([("interface", i.name.as_str()), ("mode", i.mode.as_str())], 1.0));
        out.gauges(
            "lb_interface_info",
            "Interfaces that the program is attached to, with the XDP mode",
            interfaces,
        )?;
        self.loaded(out)?;
        self.announcement(out)?;
        out.gauge(
            "lb_control_revision",
            "Newest revision of the desired state",
            head.revision.number as f64,
        )?;
        self.store(out)?;
        let applied = &snapshot.applied;
        out.gauge(
            "lb_control_applied_revision",
            "Revision of the desired state that is written to the maps",
            applied.revision as f64,
        )?;
        let failed = f64::from(u8::from(applied.error.is_some()));
        out.gauge("lb_control_apply_failed", "Whether the last attempt to write the maps failed", failed)?;
        let took = applied.took_us as f64 / 1e6;
        out.gauge(
            "lb_control_apply_duration_seconds",
            "Time from the arrival of the last change until the maps were written",
            took,
        )?;
        out.histogram(
            "lb_control_verdict_lag_seconds",
            "Time from a health verdict until the maps show it",
            &snapshot.verdict_lags,
        )?;
        let room = |value: fn(&crate::serve::api::types::Room) -> u64| {
            let all = snapshot.room.iter();
            all.map(move |r| ([("map", r.what.replace(' ', "_"))], value(r) as f64))
                .collect::<Vec<_>>()
                .into_iter()
        };
        out.gauges("lb_map_entries", "Map entries in use", room(|r| r.used))?;
        out.gauges("lb_map_limit_entries", "Capacity of the map, in entries", room(|r| r.limit))?;
        let guard = &head.desired.guard;
        let lists = [("deny", guard.deny.len()), ("allow", guard.allow.len())];
        let lists = lists.into_iter().map(|(list, n)| ([("list", list)], n as f64));
        out.gauges("lb_guard_entries", "Entries of the deny and allow lists", lists)?;
        let ours = Reason::ALL.iter().filter(|r| !is_worker_reason(**r));
        let reasons = ours.map(|&r| reason_sample(&(r, self.counters.reason(r))));
        out.counters("lb_dataplane_packets", "Packets that were not simply forwarded, by reason", reasons)
    }

    fn announcement(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let draining = f64::from(u8::from(self.control.host_drain().is_some()));
        out.gauge("lb_host_draining", "Whether this host is being taken out of service", draining)?;
        let Some(announcement) = self.control.announcement() else { return Ok(()) };
        let vips = announcement.vips.iter();
        let vips = vips.map(|v| ([("vip", v.vip.to_string())], f64::from(u8::from(v.on))));
        out.gauges(
            "lb_announce_vip",
            "Whether the VIP is assigned to this host, so that it is announced",
            vips,
        )?;
        let now_ms = clock::unix_ms();
        let unserved = |v: &VipState| v.kept.map_or(0, |kept| now_ms.saturating_sub(kept.since_ms));
        out.gauges(
            "lb_announce_vip_unserved_seconds",
            "Time for which the VIP is kept although no backend takes new flows; 0 if it is not kept",
            announcement.vips.iter().map(|v| ([("vip", v.vip.to_string())], unserved(v) as f64 / 1e3)),
        )?;
        let changes =
            std::iter::once(([("interface", announcement.interface.as_str())], announcement.changes));
        out.counters("lb_announce_changes", "VIPs added to and removed from the interface", changes)?;
        let failed = f64::from(u8::from(announcement.problem.is_some()));
        out.gauge("lb_announce_failed", "Whether the last attempt to add or remove VIPs failed", failed)
    }

    fn store(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let (link, report) = (self.control.link(), self.control.report());
        let up = f64::from(u8::from(link.connected));
        let labels = [("engine", link.engine.as_str())];
        out.gauges(
            "lb_store_connected",
            "Whether the store answers; for a file, whether it can be written",
            std::iter::once((labels, up)),
        )?;
        let help = "Services in the maps although the store is empty; see `lbctl status`";
        out.gauge("lb_store_orphaned_services", help, self.control.orphaned() as f64)?;
        // A local file is always reachable.
        let age_ms = if link.engine == "redb" { 0 } else { clock::unix_ms().saturating_sub(link.contact_ms) };
        let help = "Time since the store last answered";
        out.gauge("lb_store_contact_age_seconds", help, age_ms as f64 / 1e3)?;
        let lag = [("last", report.lag.last_ms), ("mean", report.lag.mean_ms), ("max", report.lag.max_ms)];
        let lag = lag.into_iter().map(|(over, ms)| ([("over", over)], ms as f64 / 1e3));
        let help = "Time from a commit on any host until this host's maps are written, over the last changes";
        out.gauges("lb_store_lag_seconds", help, lag)
    }

    fn services(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let stats = |value: fn(&lb_common::BackendStats) -> u64| {
            self.counters.services.iter().map(move |(name, s)| ([("service", name.as_str())], value(s)))
        };
        out.counters("lb_service_packets", "Packets forwarded", stats(|s| s.packets))?;
        out.counters("lb_service_bytes", "Bytes forwarded, before encapsulation", stats(|s| s.bytes))?;
        out.counters("lb_service_flows", "New flows placed", stats(|s| s.flows))?;
        let snapshot = self.control.engine().snapshot();
        let state = |value: fn(&crate::serve::api::engine::AppliedService) -> f64| {
            let all = snapshot.services.iter();
            all.map(move |(name, s)| ([("service", name.as_str())], value(s)))
        };
        out.gauges(
            "lb_service_eligible_backends",
            "Backends that take new flows",
            state(|s| s.eligible as f64),
        )?;
        out.gauges("lb_service_slots", "Slots of the table", state(|s| f64::from(s.table_size)))?;
        out.gauges(
            "lb_service_transition_slots",
            "Slots that remember a previous primary",
            state(|s| f64::from(s.transition_slots)),
        )?;
        let help = "Whether new flows arrive faster than the flow tables accept them, so that the hash alone places them";
        out.gauges("lb_service_flood", help, state(|s| f64::from(u8::from(s.flood))))?;
        let floods = snapshot.services.iter().map(|(name, s)| ([("service", name.as_str())], s.floods));
        out.counters(
            "lb_service_floods",
            "How often a flood of new flows has begun, summed over all CPUs",
            floods,
        )?;
        let problems = snapshot.problems.iter();
        let problems = problems.map(|(name, p)| ([("service", name.as_str()), ("reason", p.reason)], 1.0));
        let help = "Services whose table could not be brought up to date: no_room or not_compiled";
        out.gauges("lb_service_not_up_to_date", help, problems)?;
        let help = "Whether health is ignored because too few backends are healthy";
        out.gauges("lb_service_panic", help, state(|s| f64::from(u8::from(s.panic))))
    }

    fn backends(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let stats = |value: fn(&lb_common::BackendStats) -> u64| {
            let all = self.counters.backends.iter();
            all.map(move |(id, s)| {
                ([("service", id.service.as_str()), ("backend", id.backend.as_str())], value(s))
            })
        };
        out.counters("lb_backend_packets", "Packets forwarded", stats(|s| s.packets))?;
        out.counters("lb_backend_bytes", "Bytes forwarded, before encapsulation", stats(|s| s.bytes))?;
        out.counters("lb_backend_flows", "New flows placed", stats(|s| s.flows))?;
        let snapshot = self.control.engine().snapshot();
        let state = |value: fn(&crate::serve::api::engine::AppliedBackend) -> f64| {
            let all = snapshot.backends.iter();
            all.map(move |(id, b)| {
                ([("service", id.service.as_str()), ("backend", id.backend.as_str())], value(b))
            })
        };
        out.gauges("lb_backend_slots", "Slots of the service's table", state(|b| f64::from(b.slots)))?;
        let help = "Live flows that the flow tables assign to the backend";
        out.gauges("lb_backend_tracked_flows", help, state(|b| b.tracked_flows as f64))?;
        let help = "Whether the next hop is known; otherwise each packet consults the kernel's FIB";
        out.gauges("lb_backend_resolved", help, state(|b| f64::from(u8::from(b.resolved))))?;
        let desired = self.control.head().desired;
        let spec = |value: fn(&crate::desired::model::Backend) -> f64| {
            desired.services.iter().flat_map(move |(service, s)| {
                let labels =
                    move |name: &'_ str| [("service", service.to_string()), ("backend", name.to_owned())];
                s.backends.iter().map(move |(name, b)| (labels(name.as_str()), value(b)))
            })
        };
        out.gauges(
            "lb_backend_weight",
            "Share of new flows relative to the service's other backends",
            spec(|b| f64::from(b.weight)),
        )?;
        let draining = |b: &crate::desired::model::Backend| {
            f64::from(u8::from(b.state == crate::desired::model::BackendState::Draining))
        };
        out.gauges(
            "lb_backend_draining",
            "Whether the backend drains: it gets no new flows while its existing flows end",
            spec(draining),
        )
    }

    fn regions(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let decided = self.control.region_snapshot();
        let snapshot = self.control.engine().snapshot();
        let region = |name: &crate::desired::model::Name| [("region", name.to_string())];
        let down =
            |r: &crate::observed::regions::RegionShown| r.agreed == crate::plan::policy::region::Agreed::Down;
        let downs = decided.regions.iter().map(|r| (region(&r.name), f64::from(u8::from(down(r)))));
        out.gauges("lb_region_down", "Whether vantage points agree that the region is down", downs)?;
        let times =
            decided.regions.iter().filter_map(|r| Some((region(&r.name), f64::from(r.rtt_us?) / 1e6)));
        out.gauges("lb_region_rtt_seconds", "Round-trip time to the region", times)?;
        let labels = |service: &crate::desired::model::Name, region: &crate::desired::model::Name| {
            [("service", service.to_string()), ("region", region.to_string())]
        };
        let shares = snapshot.services.iter().flat_map(|(service, s)| {
            s.regions.iter().map(move |share| (labels(service, &share.name), f64::from(share.permille) / 1e3))
        });
        out.gauges(
            "lb_service_region_share_ratio",
            "Share of new flows that the table gives to the region",
            shares,
        )?;
        let places = |value: fn(&crate::plan::policy::region::Place) -> Option<u64>| {
            decided.services.values().flat_map(move |e| {
                let all = e.regions.iter();
                all.filter_map(move |p| Some((labels(&e.service, &p.name), value(p)? as f64)))
            })
        };
        let help = "Requests that the region's replicas report to be able to run concurrently";
        out.gauges("lb_service_region_capacity", help, places(|p| p.capacity))?;
        let help = "Requests running and waiting on the region's replicas";
        out.gauges("lb_service_region_load", help, places(|p| p.capacity.map(|_| p.load)))?;
        let unplaced = decided
            .services
            .values()
            .map(|e| ([("service", e.service.to_string())], e.decision.spill.unplaced as f64));
        let help = "Requests that no region may take: their own is full, and the others are full or get none by the policy";
        out.gauges("lb_service_spill_unplaced_requests", help, unplaced)?;
        let rollouts = decided.services.values().filter_map(|e| e.rollout.as_ref()).map(|r| {
            let version = ("version", r.rollout.version.clone());
            let state = ("state", r.rollout.state.label().to_owned());
            ([("service", r.service.to_string()), version, state], f64::from(r.rollout.share()) / 1e3)
        });
        out.gauges("lb_rollout_share_ratio", "Share of new flows that the new version should get", rollouts)?;
        let covered = decided.services.values().filter_map(|e| e.rollout.as_ref()).flat_map(|r| {
            r.coverage.regions.iter().map(|region| {
                let [service, place] = labels(&r.service, &region.region);
                ([service, place, ("version", r.rollout.version.clone())], f64::from(region.new_ready))
            })
        });
        let help = "Backends of the new version that take new flows, by region; 0 where it is missing";
        out.gauges("lb_rollout_region_ready_backends", help, covered)
    }

    fn replicas(&self, out: &mut Encoder<'_>) -> fmt::Result {
        type Labels = [(&'static str, String); 2];
        let now = clock::unix_ms();
        self.control.replicas().read(|all| {
            let labels = |id: &crate::desired::model::BackendId| {
                [("service", id.service.to_string()), ("backend", id.backend.to_string())]
            };
            let states = all.iter().map(|(id, e)| {
                let [service, backend] = labels(id);
                ([service, backend, ("state", e.readiness.label().to_owned())], 1.0)
            });
            out.gauges(
                "lb_replica_state",
                "State that the replica reports; one series per replica, with value 1",
                states,
            )?;
            let gauge = |value: fn(&crate::desired::model::Report) -> Option<f64>| -> Vec<(Labels, f64)> {
                let of = |(id, e): (_, &crate::observed::replica::ReplicaEntry)| {
                    Some((labels(id), value(e.report.as_ref()?)?))
                };
                all.iter().filter_map(of).collect()
            };
            for (name, help, values) in [
                ("lb_replica_running", "Requests being processed", gauge(|r| Some(r.running.into()))),
                ("lb_replica_waiting", "Requests waiting in the queue", gauge(|r| Some(r.waiting.into()))),
                (
                    "lb_replica_capacity",
                    "Requests that can run concurrently",
                    gauge(|r| r.capacity.map(f64::from)),
                ),
                (
                    "lb_replica_kv_cache_usage_ratio",
                    "Share of the KV cache in use",
                    gauge(|r| r.kv_cache_usage),
                ),
                (
                    "lb_replica_tokens_per_second",
                    "Tokens generated per second",
                    gauge(|r| r.tokens_per_second),
                ),
                (
                    "lb_replica_gpu_memory_used_bytes",
                    "GPU memory in use",
                    gauge(|r| r.gpu_memory.map(|m| m.used_bytes as f64)),
                ),
            ] {
                out.gauges(name, help, values.into_iter())?;
            }
            let of = |value: fn(&crate::observed::replica::ReplicaEntry) -> Option<f64>| {
                all.iter().filter_map(move |(id, e)| Some((labels(id), value(e)?)))
            };
            let help = "Load score, in millionths of the replica's capacity";
            out.gauges("lb_replica_load_score", help, of(|e| e.score.map(f64::from)))?;
            let ages = all.iter().filter(|(_, e)| e.report.is_some());
            let ages = ages.map(|(id, e)| (labels(id), now.saturating_sub(e.report_ms) as f64 / 1e3));
            out.gauges("lb_replica_report_age_seconds", "Time since the last valid report", ages)?;
            let results = all.iter().flat_map(|(id, e)| {
                [("ok", e.reports), ("refused", e.refused)].map(|(result, count)| {
                    let [service, backend] = labels(id);
                    ([service, backend, ("result", result.to_owned())], count)
                })
            });
            out.counters("lb_replica_reports", "Reports since start, by result", results)?;
            let breaks = all.iter().map(|(id, e)| (labels(id), e.breaks));
            out.counters("lb_replica_breaks", "Broken streams and failed polls since start", breaks)
        })
    }

    /// Backends that the ejection limit holds in.
    fn held(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let snapshot = self.control.engine().snapshot();
        let held = snapshot.backends.iter().filter(|(_, b)| b.held);
        let held = held
            .map(|(id, _)| ([("service", id.service.to_string()), ("backend", id.backend.to_string())], 1.0));
        out.gauges(
            "lb_backend_held_in",
            "Backends that the ejection limit holds in although they fail their checks",
            held,
        )
    }

    /// What is counted about the probes of all backends together.
    fn all_probes(&self, out: &mut Encoder<'_>) -> fmt::Result {
        let counts = self.control.health().counts();
        let not_probed = ObstacleKind::ALL.iter().zip(counts.not_probed);
        out.counters(
            "lb_health_not_probed",
            "Health checks that this host could not make since start, by reason; the last verdicts stand",
            not_probed.map(|(kind, n)| ([("reason", kind.label())], n)),
        )?;
        out.histogram(
            "lb_health_probe_lateness_seconds",
            "Time from when a health probe was due until it began",
            &counts.lateness,
        )
    }

    fn probes(&self, out: &mut Encoder<'_>) -> fmt::Result {
        self.control.health().read(|all| {
            let labels = |id: &crate::desired::model::BackendId| {
                [("service", id.service.to_string()), ("backend", id.backend.to_string())]
            };
            let verdicts = all.iter().filter(|(_, e)| e.health != Health::Unknown);
            let verdicts =
                verdicts.map(|(id, e)| (labels(id), f64::from(u8::from(e.health == Health::Healthy))));
            out.gauges(
                "lb_backend_healthy",
                "Verdict of the health checks; absent while there is no verdict",
                verdicts,
            )?;
            let results = all.iter().flat_map(|(id, e)| {
                [("ok", e.successes), ("failed", e.failures), ("late", e.late)].map(|(result, count)| {
                    let [service, backend] = labels(id);
                    ([service, backend, ("result", result.to_owned())], count)
                })
            });
            let busy = all.iter().filter_map(|(id, e)| Some((labels(id), e.is_busy()? as f64 / 1e3)));
            out.gauges(
                "lb_backend_busy_since_seconds",
                "Time since which a healthy backend answers its checks late, in seconds since 1970 UTC; absent if it does not",
                busy,
            )?;
            out.counters("lb_health_probes", "Health probes since start, by result", results)?;
            let waiting =
                all.iter().filter_map(|(id, e)| Some((labels(id), e.not_probed.as_ref()?.since_ms as f64 / 1e3)));
            out.gauges(
                "lb_health_not_probed_since_seconds",
                "Time since which the checks of a backend cannot be made, in seconds since 1970 UTC; absent while they can",
                waiting,
            )?;
            let with_failures =
                all.iter().filter(|(_, e)| e.passive != crate::observed::health::PassiveReport::default());
            let signs = with_failures.clone().flat_map(|(id, e)| {
                [("unreachable", e.passive.unreachable), ("refused", e.passive.refused)].map(
                    |(sign, count)| {
                        let [service, backend] = labels(id);
                        ([service, backend, ("sign", sign.to_owned())], count)
                    },
                )
            });
            let help = "Passive health check failures since start: ICMP errors, and SYNs answered by a reset";
            out.counters("lb_health_signs", help, signs)?;
            let early = with_failures.flat_map(|(id, e)| {
                // The probe may still be under way.
                let confirmed = e.passive.early.saturating_sub(e.passive.refuted);
                [("refuted", e.passive.refuted), ("confirmed", confirmed)].map(|(result, count)| {
                    let [service, backend] = labels(id);
                    ([service, backend, ("result", result.to_owned())], count)
                })
            });
            out.counters(
                "lb_health_early_probes",
                "Probes sent early because of passive failures, by result",
                early,
            )
        })
    }
}
