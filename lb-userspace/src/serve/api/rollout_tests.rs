//! Roll-outs, their lock, and the declaration of regions, over a real socket and store.

use super::tests::{Bed, bed, web};
use reqwest::Method;
use serde_json::{Value, json};

/// A service whose replicas run a version each, and a bed that has their reports.
async fn bed_of_versions(versions: &[(&str, &str)]) -> Bed {
    let bed = bed(true).await;
    let mut service = web();
    (service["replica"], service["backends"]) = (json!({"kind": "stream"}), json!({}));
    for (at, (name, version)) in versions.iter().enumerate() {
        let region = &name[..name.len() - 1];
        service["backends"][name] = json!({"address": format!("10.1.0.{at}"), "region": region});
        let text = json!({"phase": "ready", "running": 0, "waiting": 0, "model": "m", "version": version});
        let report = crate::desired::model::Report::parse(text.to_string().as_bytes()).unwrap();
        let entry = crate::observed::replica::ReplicaEntry { report: Some(report), ..Default::default() };
        let id = crate::desired::model::BackendId {
            service: "web".parse().unwrap(),
            backend: name.parse().unwrap(),
        };
        bed.control.replicas().change(|all| all.insert(id, entry));
    }
    bed.send(Method::POST, "/v1/services/web", service).await.unwrap();
    bed
}

#[tokio::test]
async fn clearing_an_aborted_roll_out_needs_force_and_says_what_goes_where() {
    let bed = bed_of_versions(&[("east1", "v1"), ("east2", "v2"), ("west1", "v1")]).await;
    let start = json!({"model": "m", "version": "v2", "permille": 50});
    bed.send(Method::POST, "/v1/rollouts", start).await.unwrap();
    bed.send(Method::POST, "/v1/rollouts/abort", json!({"reason": "slow"})).await.unwrap();
    let (code, message, fix) = bed.error(Method::POST, "/v1/rollouts/clear", json!({})).await;
    assert_eq!(code, "needs_force");
    assert_eq!(
        message,
        "without the roll-out of v2 on service web, which was aborted (slow), new flows go by weight again: v2 gets 50 % in \
         region east (east2) instead of 0 %"
    );
    assert!(fix.unwrap().contains("force=true"));
    let (code, message, _) = bed.error(Method::POST, "/v1/rollouts/promote", json!({})).await;
    assert_eq!(
        (code.as_str(), message.as_str()),
        ("needs_force", "the roll-out of v2 of m was aborted: slow")
    );
    let before = bed.revision();
    let done = bed.send(Method::POST, "/v1/rollouts/clear", json!({"force": true})).await.unwrap();
    assert_eq!(bed.revision(), before + 1);
    assert!(done["notes"][0].as_str().unwrap().contains("v2 gets 50 % in region east"), "{done}");
}

#[tokio::test]
async fn a_roll_out_goes_region_by_region() {
    let bed = bed_of_versions(&[("east1", "v1"), ("east2", "v2"), ("west1", "v1")]).await;
    let start = |regions: Value| json!({"model": "m", "version": "v2", "permille": 50, "regions": regions});
    let (_, message, fix) = bed.error(Method::POST, "/v1/rollouts", start(json!(["esat"]))).await;
    assert_eq!(message, "no backend of web is in region esat");
    assert_eq!(fix.unwrap(), "regions with backends: east, west");
    let done = bed.send(Method::POST, "/v1/rollouts", start(json!(["east"]))).await.unwrap();
    let line = |done: &Value| -> String {
        let differences: Vec<crate::desired::model::Difference> =
            serde_json::from_value(done["differences"].clone()).unwrap();
        differences.iter().map(ToString::to_string).collect::<Vec<_>>().join("|")
    };
    assert_eq!(line(&done), "web: roll-out of v2 of m at 5 % in east");
    let step = |body: Value| bed.send(Method::POST, "/v1/rollouts/step", body);
    assert!(step(json!({})).await.unwrap_err().message.contains("needs a share"));
    assert!(step(json!({"regions": ["wset"]})).await.unwrap_err().message.contains("region wset"));
    let done = step(json!({"permille": 200, "regions": ["east", "west"]})).await.unwrap();
    assert_eq!(line(&done), "web: roll-out of v2 of m: 5 % in east → 20 % in east, west");
    let (code, message, _) = bed.error(Method::POST, "/v1/rollouts/promote", json!({})).await;
    assert_eq!(code, "needs_force");
    assert!(message.contains("limited to east, west"), "{message}");
    let done = step(json!({"regions": []})).await.unwrap();
    assert_eq!(line(&done), "web: roll-out of v2 of m: 20 % in east, west → 20 %");
    bed.send(Method::POST, "/v1/rollouts/promote", json!({})).await.unwrap();
    assert!(step(json!({"permille": 1})).await.unwrap_err().message.contains("is promoted"));
    let history = bed.send(Method::GET, "/v1/history", Value::Null).await.unwrap();
    let last = history["revisions"][0]["message"].as_str().unwrap();
    assert_eq!(last, "web: roll-out of v2 of m: promoted (by ann)");
}

#[tokio::test]
async fn a_roll_out_and_a_drain_are_listed_as_holders_of_the_lock() {
    let bed = bed_of_versions(&[("east1", "v1"), ("west1", "v2")]).await;
    let locks = || bed.send(Method::GET, "/v1/locks", Value::Null);
    assert_eq!(locks().await.unwrap(), json!([]));
    let start = json!({"model": "m", "version": "v2", "permille": 50});
    bed.send(Method::POST, "/v1/rollouts", start).await.unwrap();
    let held = locks().await.unwrap();
    assert_eq!(held[0]["name"], "rollout");
    assert_eq!(held[0]["holder"], "roll-out of v2 of m on service web");
    assert_eq!(held[0]["reason"], "until `lbctl rollout promote` or `lbctl rollout abort`");
    assert_eq!(held[0]["is_operation"], true);
    let (code, message, fix) =
        bed.error(Method::POST, "/v1/locks/rollout", json!({"reason": "r", "ttl_s": 60})).await;
    assert_eq!(code, "held");
    assert_eq!(message, "not possible now: the roll-out of v2 of m on service web holds the lock rollout");
    assert!(fix.unwrap().contains("lbctl rollout abort"));
    let (code, ..) = bed.error(Method::DELETE, "/v1/locks/rollout?force=true", Value::Null).await;
    assert_eq!(code, "held", "force does not end a roll-out");
    bed.send(Method::POST, "/v1/rollouts/abort", json!({})).await.unwrap();
    assert_eq!(locks().await.unwrap(), json!([]));
    bed.send(Method::POST, "/v1/regions/east/drain", Value::Null).await.unwrap();
    assert_eq!(locks().await.unwrap()[0]["holder"], "drain of region east");
}

#[tokio::test]
async fn declaring_the_first_region_says_which_others_are_declared_with_it() {
    let bed = bed_of_versions(&[("east1", "v1"), ("west1", "v1")]).await;
    let done = bed.send(Method::POST, "/v1/regions/north", Value::Null).await.unwrap();
    assert_eq!(
        done["notes"],
        json!([
            "no region was declared before, so those in use are declared with it: east, west; from now on, others are \
                refused"
        ])
    );
    let done = bed.send(Method::POST, "/v1/regions/south", Value::Null).await.unwrap();
    assert!(done.get("notes").is_none(), "{done}");
    let (_, message, _) = bed.error(Method::DELETE, "/v1/regions/west", Value::Null).await;
    assert_eq!(message, "region west is in use by backend web/west1");
    bed.send(Method::DELETE, "/v1/regions/south", Value::Null).await.unwrap();
    let move_away = json!({"region": "east"});
    bed.send(Method::PATCH, "/v1/services/web/backends/west1", move_away).await.unwrap();
    bed.send(Method::DELETE, "/v1/regions/west", Value::Null).await.unwrap();
}
