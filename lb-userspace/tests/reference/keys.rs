//! Descriptions of every key of the configuration file's desired state. `settings.rs` compares the lists with the keys
//! that the parser knows, and the defaults with those of the code.

/// One key: name, type with its unit, default (empty: the key is required), meaning.
pub type Key = (&'static str, &'static str, &'static str, &'static str);

/// One table of the file.
pub struct Table {
    /// Heading, as in the file.
    pub title: &'static str,
    /// Description of the table.
    pub about: &'static str,
    /// Keys that the parser knows.
    pub known: &'static [&'static str],
    /// Descriptions of the keys, in the same order.
    pub keys: &'static [Key],
}

use lb_userspace::desired::config::keys;

/// Keys outside of any table.
pub const TOP: Table = Table {
    title: "Top level",
    about: "The file's tables, and one key before them.",
    known: keys::TOP,
    keys: &[
        (
            "revision",
            "integer",
            "none",
            "Revision of the desired state that the file was made from (`lbctl config export --with-revision`). `lbctl config apply` refuses the file when a newer revision exists.",
        ),
        ("lbd", "table", "none", "Settings of the daemon itself: `[lbd]`, below."),
        (
            "hook",
            "array of tables",
            "none",
            "Programs that `lbd` starts when something happens: `[[hook]]`, below.",
        ),
        (
            "region",
            "array of tables",
            "none",
            "Regions: `[[region]]`, below. Once one region is named, every region that a backend or rule uses must be named.",
        ),
        (
            "service",
            "array of tables",
            "none",
            "Services: `[[service]]`, below. A file without this key leaves the services as they are; `service = []` means no services.",
        ),
    ],
};

/// `[[service]]` and the tables in it.
pub const TABLES: &[Table] = &[
    Table {
        title: "[[hook]]",
        about: "A program that `lbd` starts when something happens. Only this file has hooks: the API cannot set them, and `lbctl config apply` ignores them.",
        known: keys::HOOK,
        keys: &[
            (
                "on",
                "array of strings",
                "",
                "Kinds of [events](api.md#events), or the words that they begin with: `[\"backend.down\", \"vip\"]`.",
            ),
            (
                "run",
                "array of strings",
                "",
                "Absolute path of the program, and its arguments. It gets the event as JSON on standard input.",
            ),
            (
                "timeout_s",
                "integer, seconds",
                "`10`",
                "Time after which the program and its process group are killed, 1 to 3600.",
            ),
        ],
    },
    Table {
        title: "[[service]]",
        about: "A service: an address, ports and a protocol that clients connect to, and the backends behind it.",
        known: keys::SERVICE,
        keys: &[
            (
                "name",
                "string",
                "",
                "Name of the service: letters, digits, `-`, `_` and `.`; at most 63 characters. Unique in the file.",
            ),
            (
                "vip",
                "IP address",
                "",
                "Virtual IP address that clients connect to. A unicast address, no loopback or link-local one.",
            ),
            (
                "port",
                "integer or string",
                "",
                "One port (`80`), a range (`\"1000-2000\"`) or `\"any\"`. An exact port wins over a range, a range over `any`. At most 16 ranges per VIP.",
            ),
            ("protocol", "string", "", "`tcp` or `udp`."),
            (
                "mode",
                "string",
                "ipip",
                "Forwarding mode. `ipip`: IP-in-IP encapsulation. `gue`: Generic UDP Encapsulation. `l2`: only the destination MAC address is rewritten. `nat`: addresses and ports are translated. `local`: packets go to this host's own stack.",
            ),
            (
                "scheduler",
                "string",
                "maglev",
                "How a new flow gets its backend. `maglev`: weighted consistent hashing. `p2c`: the less loaded of the slot's two backends. `rr`, `wrr`: round robin, plain or weighted. `random`: weighted random. `lc`: least loaded for its weight, by `replica` if given, else by live flows. `source-hash`: by the client's address alone.",
            ),
            (
                "load_cap",
                "integer, flows",
                "none",
                "Only with `source-hash`: when a backend has more load than this many flows of a backend of mean weight, a new flow goes to the slot's second choice if that has less load.",
            ),
            (
                "second_chance",
                "boolean",
                "true for TCP, false for UDP",
                "Only with mode `gue` and scheduler `maglev`, `p2c` or `source-hash`: packets carry the other backends that may have their flow, and a worker without a socket for the flow sends the packet on to the next one. For UDP the application must use connected sockets.",
            ),
            (
                "table_size",
                "integer, slots",
                "by number of backends",
                "Size of the service's Maglev table; one of the primes that `lbctl config check` names when the value is another.",
            ),
            (
                "seed",
                "integer",
                "from VIP, port and protocol",
                "Seed of the flow hash and of the table. A new seed places new flows differently; established flows stay.",
            ),
            (
                "drain_s",
                "integer, seconds",
                "300",
                "Drain window: after a change, how long each changed slot remembers its previous backend, and how long a draining or removed backend keeps its established flows.",
            ),
            (
                "slow_start_s",
                "integer, seconds",
                "0",
                "Time in which a backend that is new or healthy again grows to its full share of new flows; 0 gives it the full share at once. At most 86400.",
            ),
            (
                "udp_stateless",
                "boolean",
                "false",
                "UDP only: place each datagram by hash alone and keep no flow entries. Only with `maglev` and `source-hash`.",
            ),
            (
                "udp_timeout_s",
                "integer, seconds",
                "120",
                "UDP only: a flow that is idle for this long is forgotten.",
            ),
            (
                "tcp_timeout_s",
                "integer, seconds",
                "7440",
                "TCP only: a flow in the flow table, or a binding of mode `nat`, that is idle for this long is forgotten (default: RFC 5382). A client that vanished counts for `lc` until then; a connection that is quiet for longer may be placed anew, so keep it above the clients' keep-alive. 10 to 604800.",
            ),
            (
                "quic",
                "array of strings",
                "[]",
                "UDP only: route QUIC packets by connection id (QUIC-LB). Each string is `CONFIG_ID:SERVER_ID_BYTES:NONCE_BYTES`, with `:KEY` (32 hexadecimal digits) if ids are encrypted.",
            ),
            (
                "gue_port",
                "integer",
                "6080",
                "Destination UDP port of GUE packets; `lbd worker --gue-port` must match.",
            ),
            (
                "new_flow_rate",
                "string",
                "none",
                "Limit of new flows of the whole service, per ingress host: `N`, `N/s`, `N/m` or `N/h`.",
            ),
            (
                "new_flow_burst",
                "integer, flows",
                "what one second brings",
                "New flows above the rate that the service accepts at once. Needs `new_flow_rate`.",
            ),
            (
                "source_rate",
                "string",
                "none",
                "Limit of new flows of one source, per service and ingress host: `N`, `N/s`, `N/m` or `N/h`.",
            ),
            (
                "source_burst",
                "integer, flows",
                "what one second brings",
                "New flows above the rate that one source may open at once. Needs `source_rate`.",
            ),
            (
                "source_prefix_v4",
                "integer, bits",
                "32",
                "Length of the IPv4 prefix that counts as one source for `source_rate`: 1 to 32.",
            ),
            (
                "source_prefix_v6",
                "integer, bits",
                "64",
                "Length of the IPv6 prefix that counts as one source for `source_rate`: 1 to 128.",
            ),
            (
                "on_down",
                "string",
                "keep",
                "What happens to established flows of a backend that is found down. `keep`: they stay. `reset`: they move to another backend, whose RST ends the connection at once.",
            ),
            (
                "when_all_down",
                "string",
                "keep",
                "What happens to the VIP on hosts that announce it when no backend takes new flows and no other host serves the VIP. `keep`: it stays announced so that established flows continue, for `drain_s` and while flows remain. `withdraw`: it is removed at once. `reset`: it stays announced until another host serves it, and packets without a backend are answered: TCP with a reset, UDP with ICMP port unreachable (needs the feature `reject`). A VIP of several services stays if any of them says `keep` or `reset`.",
            ),
            (
                "panic_percent",
                "integer, percent",
                "10 for a new service",
                "Panic threshold: when less than this share of the backends' weight is healthy, health is ignored and all backends serve. 0 turns this off. Services that a version before this default stored keep 0.",
            ),
            (
                "max_ejection_percent",
                "integer, percent",
                "no limit",
                "Ejection limit: checks alone take out at most this share of the backends' weight within `ejection_window_s`, and at least one backend. Others that fail are held in meanwhile, which `lbctl status` names. Drains and `state = \"down\"` are not limited.",
            ),
            (
                "ejection_window_s",
                "integer, seconds",
                "60",
                "Time for which an ejection counts towards `max_ejection_percent`.",
            ),
            (
                "seating",
                "array of [seat, weight]",
                "[]",
                "History of the positions in the Maglev table. Written by `lbd`; leave it out. Only hosts that share no store and must build equal tables need to copy it.",
            ),
            (
                "health",
                "table",
                "kind tcp",
                "Health check: `[service.health]`, below. A new TCP service with one port, without replica state and not of mode `local`, is checked by `tcp` if it names none; others are not checked. Services that a version before this default stored keep `none`.",
            ),
            ("replica", "table", "none", "Source of replica state: `[service.replica]`, below."),
            ("regions", "table", "none", "Residency and spread over regions: `[service.regions]`, below."),
            (
                "rollout",
                "table",
                "none",
                "Roll-out of a new model version: `[service.rollout]`, below. Normally written by `lbctl rollout start`.",
            ),
            ("backend", "array of tables", "[]", "Backends: `[[service.backend]]`, below."),
        ],
    },
    Table {
        title: "[[service.backend]]",
        about: "A backend of the service above it.",
        known: keys::BACKEND,
        keys: &[
            ("name", "string", "", "Name of the backend, unique within its service."),
            (
                "address",
                "IP address",
                "",
                "The worker's own address. IPv4 or IPv6 for an IPv4 service, IPv6 for an IPv6 service.",
            ),
            ("port", "integer", "the service's port", "Mode `nat` only: port that the worker listens on."),
            (
                "weight",
                "integer",
                "1",
                "Share of new flows relative to the other backends of the service: 0 to 65535. 0 takes no new flows.",
            ),
            (
                "state",
                "string",
                "up",
                "Administrative state. `up`: takes new flows. `draining`: takes no new flows, keeps established ones. `down`: switched off.",
            ),
            (
                "seat",
                "integer",
                "a free one",
                "Stable position of the backend in the Maglev table. Written by `lbd`; leave it out.",
            ),
            (
                "server_id",
                "string, hexadecimal",
                "none",
                "Server id that the worker puts into its QUIC connection ids. Its length must match a config in `quic`.",
            ),
            ("region", "string", "that of each ingress host", "Region that the backend is in."),
            ("zone", "string", "that of each ingress host", "Zone within the region."),
        ],
    },
    Table {
        title: "[service.health]",
        about: "How the backends of the service are checked.",
        known: keys::HEALTH,
        keys: &[
            (
                "kind",
                "string",
                "",
                "`none`: no check, backends count as healthy. `tcp`: a connection opens. `tls`: a TLS handshake succeeds. `http`, `https`: a GET is answered as expected. `grpc`, `grpcs`: grpc.health.v1 answers SERVING.",
            ),
            ("path", "string", "/", "`http`, `https`: path and query of the request."),
            ("host", "string", "the VIP", "`http`, `https`: Host header. `grpc`, `grpcs`: authority."),
            (
                "status",
                "[first, last]",
                "[200, 299]",
                "`http`, `https`: status codes that count as healthy, both bounds included.",
            ),
            ("headers", "table", "{}", "`http`, `https`: additional request headers."),
            (
                "body",
                "string",
                "none",
                "`http`, `https`: text that the first 64 KiB of the response body must contain.",
            ),
            (
                "service",
                "string",
                "\"\"",
                "`grpc`, `grpcs`: name of the service asked about; the empty name is the whole server.",
            ),
            (
                "sni",
                "string",
                "host, else the VIP",
                "`tls`, `https`, `grpcs`: server name that is sent and checked against the certificate.",
            ),
            (
                "ca",
                "path",
                "the host's certificates",
                "`tls`, `https`, `grpcs`: file of trusted certificates (PEM).",
            ),
            ("verify", "boolean", "true", "`tls`, `https`, `grpcs`: whether the certificate is verified."),
            (
                "client_cert",
                "path",
                "none",
                "`tls`, `https`, `grpcs`: client certificate (PEM). Needs `client_key`.",
            ),
            (
                "client_key",
                "path",
                "none",
                "`tls`, `https`, `grpcs`: private key of the client certificate (PEM).",
            ),
            (
                "port",
                "integer",
                "the service's port",
                "Port that is checked. Required when the service has a range or `any`.",
            ),
            (
                "via",
                "string",
                "see there",
                "`direct`: probes go to the backend's own address. `tunnel`: probes go encapsulated to the VIP, as clients' packets do (modes `ipip`, `gue` and `l2`; Linux 6.6). The default of a new check is `tunnel` in these modes, if it asks the port of a TCP service itself; one that an earlier version stored stays direct.",
            ),
            (
                "interval_ms",
                "integer, milliseconds",
                "1000",
                "Time between two probes of one backend; at least 10.",
            ),
            (
                "jitter_percent",
                "integer, percent",
                "10",
                "Random variation of each interval, both ways; at most 50.",
            ),
            (
                "timeout_ms",
                "integer, milliseconds",
                "500",
                "A probe without a connection fails after this time; one that is connected and has no answer is late.",
            ),
            (
                "busy_timeout_ms",
                "integer, milliseconds",
                "60000",
                "A late probe fails if no answer comes within this time from its start; until then the backend is `busy` and \
                 keeps its flows. Not above `timeout_ms`: a late probe fails at once.",
            ),
            ("rise", "integer, probes", "2", "Consecutive successes that make a backend healthy."),
            ("fall", "integer, probes", "3", "Consecutive failures that make a backend unhealthy."),
            (
                "damping",
                "boolean",
                "true",
                "Flap damping: a backend that falls repeatedly must pass more probes each time before it is healthy again.",
            ),
            (
                "signs",
                "boolean",
                "true",
                "Passive checks: ICMP errors and refused connections seen in traffic start a probe immediately.",
            ),
        ],
    },
    Table {
        title: "[service.replica]",
        about: "Where the state of the process behind each backend comes from (requests running and waiting, KV cache, model version).",
        known: keys::REPLICA,
        keys: &[
            (
                "kind",
                "string",
                "",
                "`stream`: event stream of our inference worker. `vllm`, `sglang`, `tgi`, `triton`: that server's metrics page. `custom`: any metrics page, described by `metrics`.",
            ),
            (
                "port",
                "integer",
                "the service's port",
                "Port of the replica's state. Required when the service has a range or `any`.",
            ),
            ("path", "string", "/replica for stream, else /metrics", "Path and query."),
            (
                "interval_ms",
                "integer, milliseconds",
                "1000",
                "Time between two requests when there is no stream: 10 to 3600000.",
            ),
            (
                "timeout_ms",
                "integer, milliseconds",
                "1000",
                "A request fails after this time. A stream ends when it is silent for three intervals and this time.",
            ),
            (
                "capacity",
                "integer, requests",
                "what the replica reports",
                "Requests that a replica can run concurrently, if it does not report its capacity.",
            ),
            (
                "metrics",
                "table",
                "the usual names",
                "Names of the metrics: `[service.replica.metrics]`, below.",
            ),
        ],
    },
    Table {
        title: "[service.replica.metrics]",
        about: "Names of metrics on the replica's page, as in PromQL: `name` or `name{label=\"value\"}`. Each key replaces the usual name of its server kind.",
        known: keys::METRICS,
        keys: &[
            ("running", "string", "by kind", "Requests being processed."),
            ("waiting", "string", "by kind", "Requests waiting in the queue."),
            ("kv_cache_usage", "string", "by kind", "Share of the KV cache in use, 0 to 1."),
            ("capacity", "string", "by kind", "Requests that can run concurrently."),
            ("tokens_total", "string", "by kind", "Tokens generated so far (a counter)."),
            ("tokens_per_second", "string", "by kind", "Tokens generated per second (a gauge)."),
            ("gpu_memory_used", "string", "by kind", "GPU memory in use, in bytes."),
            ("gpu_memory_total", "string", "by kind", "Total GPU memory, in bytes."),
            ("awake", "string", "by kind", "0 while the model sleeps; the replica takes no new flows then."),
        ],
    },
    Table {
        title: "[service.regions]",
        about: "Where the service may run, and how its new flows are spread over regions.",
        known: keys::REGIONS,
        keys: &[
            (
                "policy",
                "string",
                "active-active",
                "`active-active`: each host's own region first, then the nearest region with free capacity. `active-passive`: the first region of `allowed` that is up. `weighted`: by `weights`, equal on all hosts.",
            ),
            (
                "allowed",
                "array of strings",
                "any region",
                "Residency: the only regions whose backends may get packets of this service. With `active-passive`, in order of preference.",
            ),
            (
                "weights",
                "table",
                "{}",
                "Only with `weighted`: share of each region. A region without a weight gets flows only when no region with a weight is up.",
            ),
            (
                "spill_at_percent",
                "integer, percent",
                "90",
                "Only with `active-active`: flows go to other regions from this share of the local capacity in use: 1 to 1000.",
            ),
            (
                "spill_until_percent",
                "integer, percent",
                "70",
                "Flows come back when local load falls below this share; at least 5 below `spill_at_percent`.",
            ),
            (
                "spill_most_percent",
                "integer, percent",
                "90",
                "Largest share of new flows that may go to other regions.",
            ),
            (
                "hold_s",
                "integer, seconds",
                "10",
                "How long the demand must be small before a spill is reduced. At most 86400.",
            ),
            ("zone_first", "boolean", "true", "Within the own region, prefer the own zone by the same rule."),
        ],
    },
    Table {
        title: "[service.rollout]",
        about: "A new version of a model that gets a share of new flows. `lbctl rollout` writes it.",
        known: keys::ROLLOUT,
        keys: &[
            ("model", "string", "", "Model, as the replicas report it."),
            ("version", "string", "", "New version, as the replicas report it."),
            (
                "permille",
                "integer, thousandths",
                "",
                "Share of new flows for the new version while the roll-out runs: 1 to 1000.",
            ),
            (
                "regions",
                "list of strings",
                "[]",
                "Regions that the roll-out includes; in others the old version serves. `[]`: all.",
            ),
            (
                "state",
                "string",
                "running",
                "`running`, `promoted` (all flows to the new version) or `aborted` (none).",
            ),
            ("since_ms", "integer, milliseconds", "0", "Start time, since 1970 UTC. Written by `lbd`."),
            ("reason", "string", "\"\"", "Why the roll-out is in this state. Written by `lbd`."),
            (
                "most_errors_percent",
                "integer, percent",
                "5",
                "Abort when more of the new version's requests fail than this, and than of the old version's; 0 never aborts.",
            ),
            (
                "most_latency_percent",
                "integer, percent",
                "200",
                "Abort when the new version's mean time to first token is above this share of the old version's; 0 never aborts.",
            ),
            (
                "least_requests",
                "integer, requests",
                "20",
                "Requests that the new version must have answered before it is judged.",
            ),
        ],
    },
    Table {
        title: "[[region]]",
        about: "A region, as the operator sets it.",
        known: keys::REGION,
        keys: &[
            ("name", "string", "", "Name of the region."),
            (
                "state",
                "string",
                "up",
                "`up`, or `draining`: no new flows to any backend in it. One region at a time may drain.",
            ),
        ],
    },
];
