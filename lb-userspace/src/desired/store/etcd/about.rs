//! Describes the store and the members of etcd's cluster.

use super::{About, EtcdInner, READ, StoreMember, locked, proto};

impl EtcdInner {
    pub(super) async fn about(&self) -> About {
        let list: Result<proto::MemberListResponse, _> =
            self.client.call("/etcdserverpb.Cluster/MemberList", &proto::Empty {}, READ).await;
        let named = list.map(|l| l.members).unwrap_or_default();
        let mut members: Vec<StoreMember> = Vec::new();
        let mut asked = Vec::new();
        for (address, answer) in self.client.statuses().await {
            let mut member = StoreMember { address: address.clone(), ..StoreMember::default() };
            match answer {
                Ok(status) => {
                    let id = status.header.as_ref().map_or(0, |h| h.member_id);
                    asked.push(id);
                    member.name = named.iter().find(|m| m.id == id).map_or(String::new(), |m| m.name.clone());
                    member.leader = status.leader == id && id != 0;
                    member.healthy = status.leader != 0 && status.errors.is_empty();
                    member.version = status.version;
                    member.size_bytes = status.db_size.max(0) as u64;
                    let no_leader = (status.leader == 0).then(|| "the member sees no leader".to_owned());
                    member.problem = status.errors.first().cloned().or(no_leader);
                }
                Err(error) => member.problem = Some(error.to_string()),
            }
            members.push(member);
        }
        let silent: Vec<String> =
            members.iter().filter(|m| m.name.is_empty()).map(|m| m.address.clone()).collect();
        for other in named.iter().filter(|m| !asked.contains(&m.id)) {
            // A member that did not answer is in the list already, perhaps with another spelling of its address.
            let known = other.client_urls.iter().any(|url| silent.iter().any(|a| url.ends_with(a.as_str())));
            if !known {
                let address = other.client_urls.join(",");
                let problem = Some("not among the configured addresses".to_owned());
                members.push(StoreMember {
                    name: other.name.clone(),
                    address,
                    problem,
                    ..StoreMember::default()
                });
            }
        }
        let by_address = |m: &StoreMember| m.address.clone();
        members.sort_by_key(by_address);
        let id = locked(&self.id).clone().unwrap_or_default();
        About { engine: "etcd".to_owned(), place: self.place.clone(), id, members }
    }
}
