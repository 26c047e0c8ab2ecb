//! Why a store refused or failed.

/// See the module.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Someone else was faster.
    #[error("the desired state is at revision {found} by now, not {expected}: look at it again, and repeat")]
    Conflict {
        /// Revision that the author saw.
        expected: u64,
        /// Newest revision.
        found: u64,
    },
    /// Never was, or no longer kept.
    #[error("revision {number} is not kept: revisions {oldest} to {newest} are")]
    NoRevision {
        /// Asked for.
        number: u64,
        /// Oldest kept.
        oldest: u64,
        /// Newest.
        newest: u64,
    },
    /// Another process has it open.
    #[error("store {file} is in use by another process: stop that lbd, or give this one its own --state-dir")]
    InUse {
        /// File.
        file: String,
    },
    /// Written by a later version.
    #[error(
        "store {file} has format {found}, and this lbd knows formats up to {known}: start the lbd that wrote it or a later one"
    )]
    Newer {
        /// File.
        file: String,
        /// Its format.
        found: u64,
        /// Newest format known.
        known: u64,
    },
    /// Not a store, or damaged.
    #[error(
        "store {file} is damaged ({what}); it was left as it is: restore it from a copy; or move it away and start lbd, \
         which then forwards by the live maps until `lbctl store restore` or `lbctl config apply` brings a state back"
    )]
    Corrupt {
        /// File.
        file: String,
        /// What was found.
        what: String,
    },
    /// The same for what belongs to this host alone.
    #[error(
        "{file} is damaged ({what}); it was left as it is: move it away, and lbd starts without the last health \
         verdicts and takes the live maps as they are"
    )]
    CorruptLocal {
        /// File.
        file: String,
        /// What was found.
        what: String,
    },
    /// Not allowed.
    #[error("store {file}: permission denied; run lbd as root (sudo), or give it a --state-dir of its own")]
    Denied {
        /// File or directory.
        file: String,
    },
    /// The file system said no.
    #[error("store {file}: {source}")]
    Io {
        /// File or directory.
        file: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Anything else, such as a transaction that failed.
    #[error("store {file}: {what}")]
    Failed {
        /// File, or address.
        file: String,
        /// What the storage library said.
        what: String,
    },
    /// The shared store cannot be reached; nothing was changed.
    #[error(
        "cut off from the store at {store} for {for_s} s ({what}): this host forwards by revision {revision} as before, \
         and takes no change until the store answers again"
    )]
    CutOff {
        /// Addresses.
        store: String,
        /// Since when, in seconds.
        for_s: u64,
        /// What went wrong.
        what: String,
        /// Revision that is in force here.
        revision: u64,
    },
    /// The store stopped answering in the midst of a write.
    #[error(
        "the store at {store} did not confirm the change ({what}): it may have been stored, or not; look at \
         `lbctl history` before repeating it"
    )]
    Unsure {
        /// Addresses.
        store: String,
        /// What went wrong.
        what: String,
    },
    /// It is there, and there was never a state from it.
    #[error(
        "cannot reach the store at {store} ({what}), and this host has no last known state to go on with"
    )]
    Unreachable {
        /// Addresses.
        store: String,
        /// What went wrong.
        what: String,
    },
    /// The data belongs to others.
    #[error(
        "{store} holds the data of store {found}, and this host belongs to store {expected}: nothing of it is taken; \
         if the host is to move there, start lbd once with --store-id {found}"
    )]
    Stranger {
        /// Addresses and prefix.
        store: String,
        /// Id of its data.
        found: String,
        /// Id that was expected.
        expected: String,
    },
    /// It lost revisions that it had confirmed.
    #[error(
        "the store at {store} is at revision {found}, and has been at {seen}: it was set back, or restored from an \
         older copy; this host keeps revision {seen}, until `lbctl store accept {found}` says that {found} is right (an \
         empty store is then filled with what this host knows)"
    )]
    SetBack {
        /// Addresses.
        store: String,
        /// Newest revision that it has.
        found: u64,
        /// Newest revision that this host has seen.
        seen: u64,
    },
    /// Its data went elsewhere.
    #[error(
        "store {store} was migrated to {to}, and takes no changes: restart lbd with --store {to} if that store holds \
         them (`lbctl store status` there shows the revision); if it does not, `lbctl store unretire` takes the \
         migration back"
    )]
    Moved {
        /// File, or addresses.
        store: String,
        /// Where.
        to: String,
    },
    /// Its data are on the way elsewhere.
    #[error(
        "store {store} is being copied to {to}, and takes no changes until that has ended: try again then"
    )]
    Moving {
        /// File, or addresses.
        store: String,
        /// Where.
        to: String,
    },
    /// They went nowhere.
    #[error("store {store} was not migrated, or is in use again: there is nothing to take back")]
    NotMoved {
        /// File, or addresses.
        store: String,
    },
    /// What the store holds is what this host has.
    #[error("there is nothing to accept: {why}")]
    NothingToAccept {
        /// What there is instead.
        why: String,
    },
    /// An import needs an empty store.
    #[error("the store at {store} holds {count} revisions already: only an empty one can be filled")]
    NotEmpty {
        /// File, or addresses.
        store: String,
        /// How many revisions.
        count: u64,
    },
    /// Somebody else has the lock.
    #[error("lock {name} is held by {holder} ({reason}), for {left_s} s more unless renewed")]
    Held {
        /// Lock.
        name: String,
        /// Who has it.
        holder: String,
        /// What for.
        reason: String,
        /// Time left, in seconds.
        left_s: u64,
    },
    /// Nobody has the lock, or not with this token.
    #[error("lock {name} is not held, or not with this token: it has run out, or was released")]
    NotHeld {
        /// Lock.
        name: String,
    },
    /// A file that is no backup, or not a whole one.
    #[error("{file} is no sound backup: {what}; nothing was changed")]
    Backup {
        /// File.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// The store's address cannot be understood.
    #[error(
        "store {url:?}: {what}; say file:///DIRECTORY, or etcd://HOST:PORT,HOST:PORT[/PREFIX] (etcds:// for TLS)"
    )]
    Address {
        /// As given.
        url: String,
        /// What is wrong.
        what: String,
    },
}
