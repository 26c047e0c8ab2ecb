//! Settings of the shared store, and the names of this host, its region and its zone.

use super::SettingsError;
use crate::desired::{
    model::Name,
    store::{Address, etcd::Access},
};
use std::path::{Path, PathBuf};

/// Longest name of a host, region or zone.
const NAME_LIMIT: usize = 63;

/// Settings of the store as given.
pub(super) struct StoreOptions {
    pub url: Option<String>,
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    pub id: Option<String>,
}

impl StoreOptions {
    /// Address of the store, access to it, and the id that it must have.
    pub fn resolve(self, state_dir: &Path) -> Result<(Address, Access, Option<String>), SettingsError> {
        let refuse = |setting, what: &str| SettingsError { setting, what: what.to_owned() };
        let address = match self.url.as_deref() {
            None => Address::File(state_dir.to_owned()),
            Some(url) => url.parse().map_err(|e: crate::desired::store::StoreError| {
                refuse("store", e.to_string().trim_start_matches("store "))
            })?,
        };
        let identity = match (self.cert, self.key) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => {
                return Err(refuse("store_cert", "a certificate needs its private key: give store_key too"));
            }
            (None, Some(_)) => {
                return Err(refuse("store_key", "a private key needs its certificate: give store_cert too"));
            }
        };
        let user = match (self.user, self.password_file) {
            (Some(user), Some(file)) => Some((user, file)),
            (None, None) => None,
            (Some(_), None) => {
                return Err(refuse("store_user", "a user needs a password: give store_password_file too"));
            }
            (None, Some(_)) => {
                return Err(refuse("store_password_file", "a password needs its user: give store_user too"));
            }
        };
        let (members, tls) = match &address {
            Address::Etcd { members, tls, .. } => (members.clone(), *tls),
            Address::File(_) => (Vec::new(), false),
        };
        if !tls && (self.ca.is_some() || identity.is_some()) && !members.is_empty() {
            let what = "certificates need TLS: give an address that begins with etcds://";
            return Err(refuse("store", what));
        }
        let is_id = |id: &String| id.len() == 16 && id.chars().all(|c| c.is_ascii_hexdigit());
        if let Some(id) = self.id.as_ref().filter(|id| !is_id(id)) {
            let what = format!(
                "{id:?} is not a store id: give 16 hexadecimal digits, as `lbctl store status` shows them"
            );
            return Err(SettingsError { setting: "store_id", what });
        }
        Ok((address, Access { members, tls, ca: self.ca, identity, user }, self.id))
    }
}

/// Checks the name of a host.
pub(super) fn host_name(setting: &'static str, name: String) -> Result<String, SettingsError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_LIMIT || !name.chars().all(fits) {
        let what = format!("{name:?} is not a valid name: use at most {NAME_LIMIT} letters, digits and -_.");
        return Err(SettingsError { setting, what });
    }
    Ok(name)
}

/// Parses the name of a region or zone, which follows the rules for names in the desired state.
pub(super) fn place_name(setting: &'static str, text: &str) -> Result<Name, SettingsError> {
    text.parse().map_err(|_| {
        let what = format!(
            "{text:?} is not a valid name: use at most {NAME_LIMIT} letters, digits and -_., a letter or digit first"
        );
        SettingsError { setting, what }
    })
}

#[cfg(test)]
mod tests {
    use super::super::Options;

    fn refused(options: Options) -> String {
        options.resolve().expect_err("must be refused").to_string()
    }

    #[test]
    fn half_an_access_is_refused_by_name() {
        let etcd = || Options { store: Some("etcd://a,b:1/eu".into()), ..Options::default() };
        let settings = etcd().resolve().unwrap();
        assert_eq!(settings.store.to_string(), "etcd://a:2379,b:1/eu");
        assert_eq!(settings.store_access.members, ["a:2379", "b:1"]);
        for (options, what) in [
            (
                Options { store: Some("redis://a".into()), ..Options::default() },
                "store: \"redis://a\": the scheme",
            ),
            (
                Options { store_cert: Some("c".into()), ..etcd() },
                "store_cert: a certificate needs its private key",
            ),
            (
                Options { store_key: Some("c".into()), ..etcd() },
                "store_key: a private key needs its certificate",
            ),
            (Options { store_user: Some("u".into()), ..etcd() }, "store_user: a user needs a password"),
            (Options { store_ca: Some("ca".into()), ..etcd() }, "etcds://"),
            (Options { store_id: Some("x".into()), ..etcd() }, "store_id: \"x\" is not a store id"),
            (Options { region: Some("eu west".into()), ..etcd() }, "region: \"eu west\" is not a valid name"),
        ] {
            let error = refused(options);
            assert!(error.contains(what), "{error}");
        }
    }
}
