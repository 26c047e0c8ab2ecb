//! The route table: all routes, each with the right that it needs.

use super::{
    access::{
        Endpoint,
        Right::{DryRun, Read, Write},
    },
    events, guard, host, locks, members, region_drain, regions, rollouts, routes, store,
};
use axum::http::Method;

/// Largest backup: 10,000 revisions of a large state.
const BACKUP_LIMIT: usize = 256 * 1024 * 1024;
/// Largest change of a guard list: a million prefixes.
const LIST_LIMIT: usize = 128 * 1024 * 1024;

/// All rows of the route table.
pub(super) fn table() -> Vec<Endpoint> {
    const GET: Method = Method::GET;
    const POST: Method = Method::POST;
    const PUT: Method = Method::PUT;
    const PATCH: Method = Method::PATCH;
    const DELETE: Method = Method::DELETE;
    vec![
        Endpoint::new(GET, "/v1/status", Read, routes::status),
        Endpoint::new(GET, "/v1/services", Read, routes::service_list),
        Endpoint::new(GET, "/v1/services/{service}", Read, routes::service_show),
        Endpoint::new(POST, "/v1/services/{service}", DryRun, routes::service_add),
        Endpoint::new(PATCH, "/v1/services/{service}", DryRun, routes::service_set),
        Endpoint::new(DELETE, "/v1/services/{service}", DryRun, routes::service_remove),
        Endpoint::new(GET, "/v1/backends", Read, routes::backend_list_all),
        Endpoint::new(GET, "/v1/services/{service}/backends", Read, routes::backend_list),
        Endpoint::new(GET, "/v1/services/{service}/backends/{backend}", Read, routes::backend_show),
        Endpoint::new(POST, "/v1/services/{service}/backends/{backend}", DryRun, routes::backend_add),
        Endpoint::new(PATCH, "/v1/services/{service}/backends/{backend}", DryRun, routes::backend_set),
        Endpoint::new(DELETE, "/v1/services/{service}/backends/{backend}", DryRun, routes::backend_remove),
        Endpoint::new(POST, "/v1/services/{service}/backends/{backend}/drain", DryRun, routes::backend_drain),
        Endpoint::new(
            POST,
            "/v1/services/{service}/backends/{backend}/undrain",
            DryRun,
            routes::backend_undrain,
        ),
        Endpoint::new(GET, "/v1/replicas", Read, routes::replicas),
        Endpoint::new(GET, "/v1/stats", Read, routes::stats),
        Endpoint::new(GET, "/v1/events", Read, events::stream::events),
        Endpoint::new(GET, "/v1/flows", Read, routes::flows),
        Endpoint::new(GET, "/v1/explain", Read, routes::explain_flow),
        Endpoint::new(GET, "/v1/config", Read, routes::config_export),
        Endpoint::new(PUT, "/v1/config", DryRun, routes::config_apply),
        Endpoint::new(GET, "/v1/history", Read, routes::history),
        Endpoint::new(GET, "/v1/history/{revision}", Read, routes::history_show),
        Endpoint::new(GET, "/v1/history/{from}/diff/{to}", Read, routes::history_diff),
        Endpoint::new(POST, "/v1/rollback", DryRun, routes::rollback),
        Endpoint::new(GET, "/v1/store", Read, store::status),
        Endpoint::new(POST, "/v1/store/migrate", Write, store::migrate),
        Endpoint::new(POST, "/v1/store/unretire", Write, store::unretire),
        Endpoint::new(GET, "/v1/store/backup", Read, store::backup),
        // Only writers may send bodies this large, even for a dry run.
        Endpoint::new(POST, "/v1/store/restore", Write, store::restore).limit(BACKUP_LIMIT),
        Endpoint::new(POST, "/v1/store/accept", Write, store::accept),
        Endpoint::new(GET, "/v1/locks", Read, locks::locks),
        Endpoint::new(POST, "/v1/locks/{name}", Write, locks::lock),
        Endpoint::new(DELETE, "/v1/locks/{name}", Write, locks::unlock),
        Endpoint::new(GET, "/v1/host", Read, host::show),
        Endpoint::new(POST, "/v1/host/drain", Write, host::drain),
        Endpoint::new(POST, "/v1/host/undrain", Write, host::undrain),
        Endpoint::new(GET, "/v1/hosts", Read, members::list),
        Endpoint::new(DELETE, "/v1/hosts/{host}", Write, members::forget),
        Endpoint::new(GET, "/v1/policy", Read, regions::policies),
        Endpoint::new(GET, "/v1/policy/{service}", Read, regions::policy),
        Endpoint::new(GET, "/v1/residency", Read, regions::residency),
        Endpoint::new(GET, "/v1/regions", Read, regions::regions),
        Endpoint::new(POST, "/v1/regions/{region}", DryRun, regions::region_add),
        Endpoint::new(DELETE, "/v1/regions/{region}", DryRun, regions::region_remove),
        Endpoint::new(POST, "/v1/regions/{region}/drain", DryRun, region_drain::region_drain),
        Endpoint::new(POST, "/v1/regions/{region}/undrain", DryRun, region_drain::region_undrain),
        Endpoint::new(GET, "/v1/rollouts", Read, rollouts::rollouts),
        Endpoint::new(POST, "/v1/rollouts", DryRun, rollouts::rollout_start),
        Endpoint::new(POST, "/v1/rollouts/{verb}", DryRun, rollouts::rollout_change),
        Endpoint::new(GET, "/v1/guard", Read, guard::show),
        Endpoint::new(GET, "/v1/guard/check", Read, guard::check),
        Endpoint::new(GET, "/v1/guard/{list}", Read, guard::entries),
        Endpoint::new(POST, "/v1/guard/{list}", Write, guard::change).limit(LIST_LIMIT),
    ]
}
