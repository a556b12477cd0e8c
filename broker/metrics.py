"""Every metric, declared once (Prometheus conventions: base units, ``_total``, no user labels)."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

_FAST = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LAG = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)

BRINGUP = Histogram(
    "cortex_bringup_seconds",
    "From the wish for a session until it is ready.",
    ("path", "driver"),
    buckets=_FAST,
    registry=REGISTRY,
)
BRINGUP_STAGE = Histogram(
    "cortex_bringup_stage_seconds", "One stage of a bring-up.", ("stage",), buckets=_FAST, registry=REGISTRY
)
FIRST_FRAME = Histogram(
    "cortex_time_to_first_frame_seconds",
    "From a client's first message on a connection to the agent's first frame.",
    ("agent",),
    buckets=_FAST,
    registry=REGISTRY,
)
RELAY_FRAMES = Counter("cortex_relay_frames_total", "Data frames relayed.", ("direction",), registry=REGISTRY)
RELAY_BYTES = Counter(
    "cortex_relay_bytes_total", "Bytes relayed, frame headers included.", ("direction",), registry=REGISTRY
)
STATE_WRITES = Counter(
    "cortex_state_writes_total",
    "State sent to a sandbox, or skipped because its hash was equal.",
    ("kind", "result"),
    registry=REGISTRY,
)
CONFIG_ASSEMBLY = Counter("cortex_config_assembly_total", "Configurations served.", ("result",), registry=REGISTRY)
CONFIG_SOURCE = Counter(
    "cortex_config_source_total", "Reads of configuration sources.", ("source", "result"), registry=REGISTRY
)
STORE_READS = Counter("cortex_store_reads_total", "Queries that read the store.", registry=REGISTRY)
STORE_WRITES = Counter("cortex_store_writes_total", "Transactions that wrote the store.", registry=REGISTRY)
SANDBOX_CALLS = Counter(
    "cortex_sandbox_calls_total", "Calls to the engine of a driver.", ("driver", "call"), registry=REGISTRY
)
SANDBOX_ERRORS = Counter(
    "cortex_sandbox_errors_total", "Failed calls to the engine of a driver.", ("driver", "call"), registry=REGISTRY
)
LINK_VIOLATIONS = Counter(
    "cortex_link_violations_total",
    "Connections and messages from sandboxes that were refused.",
    ("kind",),
    registry=REGISTRY,
)
SESSIONS = Gauge("cortex_sessions", "Sessions in memory.", ("state",), registry=REGISTRY)
CONNECTIONS = Gauge("cortex_connections", "Open client connections.", registry=REGISTRY)
REFUSED = Counter("cortex_refused_total", "Connections refused, by error code.", ("code",), registry=REGISTRY)
CLOSED = Counter("cortex_closed_total", "Client connections closed, by close code.", ("code",), registry=REGISTRY)
PACKAGES = Counter("cortex_packages_total", "MCP package installs.", ("result",), registry=REGISTRY)
LOOP_LAG = Histogram(
    "cortex_loop_lag_seconds", "How late the event loop runs a timer.", buckets=_LAG, registry=REGISTRY
)
GATEWAY_EVENTS = Counter(
    "cortex_gateway_events_total", "What the gateway process counted, by event.", ("event",), registry=REGISTRY
)
GATEWAY_CONNECTIONS = Gauge(
    "cortex_gateway_connections", "Connections from sandboxes open at the gateway.", registry=REGISTRY
)
GATEWAY_SERVERS = Gauge(
    "cortex_gateway_servers",
    "Servers of a provider, by the state of their breaker: closed (asked), half_open (tried) or open (not asked).",
    ("provider", "state"),
    registry=REGISTRY,
)
GATEWAY_CALLS = Gauge(
    "cortex_gateway_calls",
    "Calls of a provider that are running, or waiting for a limit.",
    ("provider", "state"),
    registry=REGISTRY,
)
GATEWAY_RESTING_KEYS = Gauge(
    "cortex_gateway_resting_keys",
    "The operator's keys of a provider that rest after a 429.",
    ("provider",),
    registry=REGISTRY,
)
EGRESS_DECISIONS = Counter(
    "cortex_egress_decisions_total",
    "Requests of sandboxes for hosts outside. result: allowed, denied (no list has the host), refused_address "
    "(it leads to a private one) or limited.",
    ("result",),
    registry=REGISTRY,
)
EGRESS_BYTES = Counter(
    "cortex_egress_bytes_total",
    "What sandboxes sent to and received from hosts outside.",
    ("direction",),
    registry=REGISTRY,
)
_GEN_AI = ("gen_ai_provider_name", "gen_ai_request_model", "gen_ai_operation_name")
GEN_AI_DURATION = Histogram(
    "gen_ai_client_operation_duration_seconds",
    "Calls to models, waiting for limits included. error_type: a status, cut, gone, or empty.",
    (*_GEN_AI, "error_type"),
    buckets=(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    registry=REGISTRY,
)
GEN_AI_FIRST_TOKEN = Histogram(
    "gen_ai_server_time_to_first_token_seconds",
    "Until answers began, waiting for limits left out.",
    _GEN_AI,
    buckets=(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    registry=REGISTRY,
)
GEN_AI_OUTPUT_TOKEN = Histogram(
    "gen_ai_server_time_per_output_token_seconds",
    "Of each token after the first.",
    _GEN_AI,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5),
    registry=REGISTRY,
)
GEN_AI_TOKENS = Histogram(
    "gen_ai_client_token_usage",
    "Tokens that providers charged, by call, or about as many where they did not say. gen_ai_token_type: input or "
    "output, cached and reasoning ones included.",
    (*_GEN_AI, "gen_ai_token_type"),
    buckets=tuple(4**power for power in range(14)),
    registry=REGISTRY,
)
GATEWAY_QUEUE = Histogram(
    "cortex_gateway_queue_seconds", "How long calls waited for limits.", ("provider",), buckets=_FAST, registry=REGISTRY
)
GATEWAY_COST = Counter(
    "cortex_gateway_cost_usd_total", "What calls cost by [gateway.prices].", ("provider", "model"), registry=REGISTRY
)
GATEWAY_CACHE = Counter(
    "cortex_gateway_cache_total",
    "Calls to providers whose cache or coalescing is on. result: hit, coalesced, batched or miss.",
    ("result",),
    registry=REGISTRY,
)
GATEWAY_RETRIES = Counter(
    "cortex_gateway_retries_total",
    "Calls sent again, to the same provider or another.",
    ("provider",),
    registry=REGISTRY,
)
USAGE_LOST = Counter(
    "cortex_usage_refused_total",
    "Records of calls that could not be read, so that they do not count.",
    registry=REGISTRY,
)
POOL_SIZE = Gauge(
    "cortex_pool_size",
    "Warm sandboxes. kind: generic or user; state: making, hot, paused or ending.",
    ("agent", "kind", "state"),
    registry=REGISTRY,
)
POOL_TARGET = Gauge("cortex_pool_target", "Generic warm sandboxes that there should be.", ("agent",), registry=REGISTRY)
POOL_CLAIMS = Counter(
    "cortex_pool_claims_total",
    "Claims. kind: user, generic or cold; result: hit, or why there was none: empty, stale or failed.",
    ("kind", "result"),
    registry=REGISTRY,
)
POOL_REFILLS = Counter(
    "cortex_pool_refills_total", "Warm sandboxes made, or not.", ("agent", "result"), registry=REGISTRY
)
POOL_BREAKER = Gauge(
    "cortex_pool_breaker_open",
    "1 while no warm sandbox is made because too many could not be.",
    ("agent",),
    registry=REGISTRY,
)
POOL_MEMORY = Gauge(
    "cortex_pool_memory_bytes",
    "kind: warm (what warm sandboxes take), budget (what they may), available (what the host has left), reserve "
    "(what they leave it).",
    ("kind",),
    registry=REGISTRY,
)
VAULT_ALARMS = Counter(
    "cortex_vault_alarms_total",
    "Sealed credentials that were refused: tampered with, swapped, or put back to an older version.",
    ("reason",),
    registry=REGISTRY,
)
CREDENTIAL_REFRESHES = Counter(
    "cortex_credential_refreshes_total", "Renewals of OAuth tokens.", ("provider", "result"), registry=REGISTRY
)
IDLE_SECONDS = Counter(
    "cortex_idle_seconds_total",
    "Time that sessions were up though nobody used them; state: ready or paused.",
    ("state",),
    registry=REGISTRY,
)
ACTIVITY_DROPPED = Counter(
    "cortex_activity_dropped_total", "What users did, not remembered because the store was too slow.", registry=REGISTRY
)
ACTIVITY_WRITES = Counter(
    "cortex_activity_writes_total",
    "Those of cortex_store_writes_total that wrote what users did, off their way.",
    registry=REGISTRY,
)
FORECAST = Counter(
    "cortex_forecast_total",
    "Forecasts held against who came: hit, miss (came though not expected), wasted (did not come).",
    ("result",),
    registry=REGISTRY,
)
FORECAST_READY = Counter(
    "cortex_forecast_ready_seconds_total",
    "How long sandboxes waited for users who were expected, or would have.",
    ("result",),
    registry=REGISTRY,
)
PREPARED = Counter(
    "cortex_prepared_total",
    "What was looked after for active users at quiet times. what: home, packages or credentials.",
    ("what", "result"),
    registry=REGISTRY,
)
CONFIG_RELOADS = Counter("cortex_config_reloads_total", "Reloads of config.toml.", ("result",), registry=REGISTRY)

for _state in ("stopped", "starting", "ready", "paused", "stopping", "failed"):
    SESSIONS.labels(_state)
for _state in ("ready", "paused"):
    IDLE_SECONDS.labels(_state)
for _direction in ("to_agent", "to_client"):
    RELAY_FRAMES.labels(_direction)
    RELAY_BYTES.labels(_direction)
for _result in ("hit", "empty", "stale", "failed"):
    POOL_CLAIMS.labels("generic", _result)
for _result in ("allowed", "denied", "refused_address", "limited"):
    EGRESS_DECISIONS.labels(_result)
for _result in ("hit", "coalesced", "batched", "miss"):
    GATEWAY_CACHE.labels(_result)
for _direction in ("sent", "received"):
    EGRESS_BYTES.labels(_direction)
for _reason in ("tampered", "rolled_back"):
    VAULT_ALARMS.labels(_reason)
for _kind in ("mcp", "credentials", "settings", "packages"):
    STATE_WRITES.labels(_kind, "written")
    STATE_WRITES.labels(_kind, "skipped")
