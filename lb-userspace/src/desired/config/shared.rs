//! Settings of what hosts share: the store, and who this host is among the others.

use super::SettingsError;
use crate::desired::{
    model::Name,
    store::{Address, etcd::Access},
};
use std::path::{Path, PathBuf};

/// Length of a name of a host, region or zone.
const NAME_LIMIT: usize = 63;

/// The store's settings as they were given.
pub(super) struct Shared {
    pub url: Option<String>,
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    pub id: Option<String>,
}

impl Shared {
    /// Where the store is, the access to it, and the id that it must have.
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
            (Some(_), None) => return Err(refuse("store_cert", "it needs its key: give store_key too")),
            (None, Some(_)) => {
                return Err(refuse("store_key", "it needs its certificate: give store_cert too"));
            }
        };
        let user = match (self.user, self.password_file) {
            (Some(user), Some(file)) => Some((user, file)),
            (None, None) => None,
            (Some(_), None) => {
                return Err(refuse("store_user", "it needs a password: give store_password_file too"));
            }
            (None, Some(_)) => {
                return Err(refuse("store_password_file", "whose password is it? give store_user too"));
            }
        };
        let (members, tls) = match &address {
            Address::Etcd { members, tls, .. } => (members.clone(), *tls),
            Address::File(_) => (Vec::new(), false),
        };
        if !tls && (self.ca.is_some() || identity.is_some()) && !members.is_empty() {
            let what = "certificates need TLS: begin the address of the store with etcds://";
            return Err(refuse("store", what));
        }
        let is_id = |id: &String| id.len() == 16 && id.chars().all(|c| c.is_ascii_hexdigit());
        if let Some(id) = self.id.as_ref().filter(|id| !is_id(id)) {
            let what = format!("{id:?} is none: 16 hexadecimal digits, as `lbctl store status` shows them");
            return Err(SettingsError { setting: "store_id", what });
        }
        Ok((address, Access { members, tls, ca: self.ca, identity, user }, self.id))
    }
}

/// A name of a host, region or zone.
pub(super) fn name(setting: &'static str, name: String) -> Result<String, SettingsError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > NAME_LIMIT || !name.chars().all(fits) {
        let what = format!("{name:?} is no name: letters, digits and -_. (at most {NAME_LIMIT}) are");
        return Err(SettingsError { setting, what });
    }
    Ok(name)
}

/// A region or zone: named as backends name theirs.
pub(super) fn place(setting: &'static str, text: Option<String>) -> Result<Name, SettingsError> {
    let text = text.unwrap_or_else(|| "default".to_owned());
    text.parse().map_err(|_| {
        let what = format!(
            "{text:?} is no name: letters, digits and -_. (at most {NAME_LIMIT}), with a letter or digit first"
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
            (Options { store_cert: Some("c".into()), ..etcd() }, "store_cert: it needs its key"),
            (Options { store_key: Some("c".into()), ..etcd() }, "store_key: it needs its certificate"),
            (Options { store_user: Some("u".into()), ..etcd() }, "store_user: it needs a password"),
            (Options { store_ca: Some("ca".into()), ..etcd() }, "etcds://"),
            (Options { store_id: Some("x".into()), ..etcd() }, "store_id: \"x\" is none"),
            (Options { region: Some("eu west".into()), ..etcd() }, "region: \"eu west\" is no name"),
        ] {
            let error = refused(options);
            assert!(error.contains(what), "{error}");
        }
    }
}
