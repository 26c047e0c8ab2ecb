//! The route table: all routes, each with the right that it needs.

use super::{
    access::{
        Right::{DryRun, Read, Write},
        Route,
    },
    guard, host, regions, routes, store,
};
use axum::http::Method;

/// Largest backup: 10,000 revisions of a large state.
const BACKUP_LIMIT: usize = 256 * 1024 * 1024;
/// Largest change of a guard list: a million prefixes.
const LIST_LIMIT: usize = 128 * 1024 * 1024;

/// All rows of the route table.
pub(super) fn table() -> Vec<Route> {
    const GET: Method = Method::GET;
    const POST: Method = Method::POST;
    const PUT: Method = Method::PUT;
    const PATCH: Method = Method::PATCH;
    const DELETE: Method = Method::DELETE;
    vec![
        Route::new(GET, "/v1/status", Read, routes::status),
        Route::new(GET, "/v1/services", Read, routes::service_list),
        Route::new(GET, "/v1/services/{service}", Read, routes::service_show),
        Route::new(POST, "/v1/services/{service}", DryRun, routes::service_add),
        Route::new(PATCH, "/v1/services/{service}", DryRun, routes::service_set),
        Route::new(DELETE, "/v1/services/{service}", DryRun, routes::service_remove),
        Route::new(GET, "/v1/backends", Read, routes::backend_list_all),
        Route::new(GET, "/v1/services/{service}/backends", Read, routes::backend_list),
        Route::new(GET, "/v1/services/{service}/backends/{backend}", Read, routes::backend_show),
        Route::new(POST, "/v1/services/{service}/backends/{backend}", DryRun, routes::backend_add),
        Route::new(PATCH, "/v1/services/{service}/backends/{backend}", DryRun, routes::backend_set),
        Route::new(DELETE, "/v1/services/{service}/backends/{backend}", DryRun, routes::backend_remove),
        Route::new(POST, "/v1/services/{service}/backends/{backend}/drain", DryRun, routes::backend_drain),
        Route::new(
            POST,
            "/v1/services/{service}/backends/{backend}/undrain",
            DryRun,
            routes::backend_undrain,
        ),
        Route::new(GET, "/v1/replicas", Read, routes::replicas),
        Route::new(GET, "/v1/stats", Read, routes::stats),
        Route::new(GET, "/v1/flows", Read, routes::flows),
        Route::new(GET, "/v1/explain", Read, routes::explain_flow),
        Route::new(GET, "/v1/config", Read, routes::config_export),
        Route::new(PUT, "/v1/config", DryRun, routes::config_apply),
        Route::new(GET, "/v1/history", Read, routes::history),
        Route::new(POST, "/v1/rollback", DryRun, routes::rollback),
        Route::new(GET, "/v1/store", Read, store::status),
        Route::new(POST, "/v1/store/migrate", Write, store::migrate),
        Route::new(POST, "/v1/store/unretire", Write, store::unretire),
        Route::new(GET, "/v1/store/backup", Read, store::backup),
        // Only writers may send bodies this large, even for a dry run.
        Route::new(POST, "/v1/store/restore", Write, store::restore).limit(BACKUP_LIMIT),
        Route::new(POST, "/v1/store/accept", Write, store::accept),
        Route::new(GET, "/v1/locks", Read, store::locks),
        Route::new(POST, "/v1/locks/{name}", Write, store::lock),
        Route::new(DELETE, "/v1/locks/{name}", Write, store::unlock),
        Route::new(GET, "/v1/host", Read, host::show),
        Route::new(POST, "/v1/host/drain", Write, host::drain),
        Route::new(POST, "/v1/host/undrain", Write, host::undrain),
        Route::new(GET, "/v1/policy", Read, regions::policies),
        Route::new(GET, "/v1/policy/{service}", Read, regions::policy),
        Route::new(GET, "/v1/residency", Read, regions::residency),
        Route::new(GET, "/v1/regions", Read, regions::regions),
        Route::new(POST, "/v1/regions/{region}", DryRun, regions::region_add),
        Route::new(DELETE, "/v1/regions/{region}", DryRun, regions::region_remove),
        Route::new(POST, "/v1/regions/{region}/drain", DryRun, regions::region_drain),
        Route::new(POST, "/v1/regions/{region}/undrain", DryRun, regions::region_undrain),
        Route::new(GET, "/v1/rollouts", Read, regions::rollouts),
        Route::new(POST, "/v1/rollouts", DryRun, regions::rollout_start),
        Route::new(POST, "/v1/rollouts/{verb}", DryRun, regions::rollout_change),
        Route::new(GET, "/v1/guard", Read, guard::show),
        Route::new(GET, "/v1/guard/check", Read, guard::check),
        Route::new(GET, "/v1/guard/{list}", Read, guard::entries),
        Route::new(POST, "/v1/guard/{list}", Write, guard::change).limit(LIST_LIMIT),
    ]
}
