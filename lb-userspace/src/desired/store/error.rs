//! Errors of stores.

/// Why a store refused a request or failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another change was committed first.
    #[error(
        "the desired state is at revision {found} by now, not {expected}: review it, and repeat the change"
    )]
    Conflict {
        /// Revision that the author saw.
        expected: u64,
        /// Newest revision.
        found: u64,
    },
    /// There is no record of such a host.
    #[error("no host {name} is known")]
    NoMember {
        /// Name.
        name: String,
    },
    /// The host is live.
    #[error("host {name} is live: stop its lbd first, or it would be listed again at once")]
    MemberLives {
        /// Name.
        name: String,
    },
    /// The revision never existed, or is no longer kept.
    #[error("no revision {number}; available: {oldest} to {newest}")]
    NoRevision {
        /// Requested revision.
        number: u64,
        /// Oldest kept revision.
        oldest: u64,
        /// Newest revision.
        newest: u64,
    },
    /// Another process has the store open.
    #[error(
        "store {file} is in use by another process: stop that lbd, or start this one with another --state-dir"
    )]
    InUse {
        /// File.
        file: String,
    },
    /// A later version has written the store.
    #[error(
        "store {file} has format {found}, but this lbd supports formats up to {known}: start the lbd that wrote it, or a later one"
    )]
    Newer {
        /// File.
        file: String,
        /// Format of the file.
        found: u64,
        /// Newest supported format.
        known: u64,
    },
    /// The file is not a store, or is damaged.
    #[error(
        "store {file} is damaged ({what}), and was left unchanged: restore it from a copy; or move it away and start lbd, \
         which then forwards by the live maps until `lbctl store restore` or `lbctl config apply` provides a state"
    )]
    Corrupt {
        /// File.
        file: String,
        /// Description of the damage.
        what: String,
    },
    /// The file with data of this host alone is damaged.
    #[error(
        "{file} is damaged ({what}), and was left unchanged: move it away; lbd then starts without the last health \
         results and takes the live maps as they are"
    )]
    CorruptLocal {
        /// File.
        file: String,
        /// Description of the damage.
        what: String,
    },
    /// The process lacks permission.
    #[error("store {file}: permission denied; run lbd as root (sudo), or start it with another --state-dir")]
    Denied {
        /// File or directory.
        file: String,
    },
    /// The file system reported an error.
    #[error("store {file}: {source}")]
    Io {
        /// File or directory.
        file: String,
        /// Error of the file system.
        #[source]
        source: std::io::Error,
    },
    /// Another failure, such as a failed transaction.
    #[error("store {file}: {what}")]
    Failed {
        /// File, or address.
        file: String,
        /// Message of the storage library.
        what: String,
    },
    /// The shared store cannot be reached; nothing was changed.
    #[error(
        "cut off from the store at {store} for {for_s} s ({what}): this host forwards by revision {revision} as before, \
         and accepts no changes until the store answers again"
    )]
    CutOff {
        /// Addresses.
        store: String,
        /// Time without contact, in seconds.
        for_s: u64,
        /// What went wrong.
        what: String,
        /// Revision in force on this host.
        revision: u64,
    },
    /// The store stopped answering during a write.
    #[error(
        "the store at {store} did not confirm the change ({what}): it may or may not have been stored; check \
         `lbctl history` before repeating it"
    )]
    Unsure {
        /// Addresses.
        store: String,
        /// What went wrong.
        what: String,
    },
    /// The store cannot be reached, and no state was ever loaded from it.
    #[error("cannot reach the store at {store} ({what}), and this host has no last known state to use")]
    Unreachable {
        /// Addresses.
        store: String,
        /// What went wrong.
        what: String,
    },
    /// The data have another store id.
    #[error(
        "{store} holds the data of store {found}, but this host belongs to store {expected}: its data are ignored; to move \
         this host there, start lbd once with --store-id {found}"
    )]
    Stranger {
        /// Addresses and prefix.
        store: String,
        /// Id of its data.
        found: String,
        /// Id that was expected.
        expected: String,
    },
    /// The store lost revisions that it had confirmed.
    #[error(
        "the store at {store} is at revision {found}, but has been at {seen}: it was set back, or restored from an older \
         copy; this host keeps revision {seen}; if {found} is right, run `lbctl store accept {found}` (an empty store is then \
         filled with the data of this host)"
    )]
    SetBack {
        /// Addresses.
        store: String,
        /// Newest revision of the store.
        found: u64,
        /// Newest revision that this host has seen.
        seen: u64,
    },
    /// The data were migrated to another store.
    #[error(
        "store {store} was migrated to {to}, and accepts no changes: restart lbd with --store {to} if that store holds \
         the data (`lbctl store status` there shows the revision); otherwise undo the migration with `lbctl store unretire --yes`"
    )]
    Moved {
        /// File, or addresses.
        store: String,
        /// Address of the other store.
        to: String,
    },
    /// The data are being migrated to another store.
    #[error("store {store} is being copied to {to}, and accepts no changes meanwhile: try again later")]
    Moving {
        /// File, or addresses.
        store: String,
        /// Address of the other store.
        to: String,
    },
    /// The store is not migrated.
    #[error("store {store} was not migrated, or is in use again: there is nothing to undo")]
    NotMoved {
        /// File, or addresses.
        store: String,
    },
    /// The store has the data of this host already.
    #[error("there is nothing to accept: {why}")]
    NothingToAccept {
        /// State of this host instead.
        why: String,
    },
    /// An import needs an empty store.
    #[error("the store at {store} already holds {count} revisions: only an empty store can be filled")]
    NotEmpty {
        /// File, or addresses.
        store: String,
        /// Number of revisions.
        count: u64,
    },
    /// Another holder has the lock.
    #[error("lock {name} is held by {holder} ({reason}), and expires in {left_s} s unless renewed")]
    Held {
        /// Name of the lock.
        name: String,
        /// Holder of the lock.
        holder: String,
        /// Reason for the lock.
        reason: String,
        /// Time left, in seconds.
        left_s: u64,
    },
    /// The lock is not held, or not with this token.
    #[error("lock {name} is not held, or not with this token: it has expired, or was released")]
    NotHeld {
        /// Name of the lock.
        name: String,
    },
    /// A file is not a backup, or is damaged.
    #[error("{file} is not a valid backup: {what}; nothing was changed")]
    Backup {
        /// File.
        file: String,
        /// What is wrong.
        what: String,
    },
    /// The store's address is invalid.
    #[error(
        "store {url:?}: {what}; give file:///DIRECTORY, or etcd://HOST:PORT,HOST:PORT[/PREFIX] (etcds:// for TLS)"
    )]
    Address {
        /// Address that was given.
        url: String,
        /// What is wrong.
        what: String,
    },
}
