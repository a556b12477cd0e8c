"""The part [gateway] of the settings tree: model providers, their limits and upstreams, and the way out.

What the gateway process acts on reaches it as ``broker.gateway.policy`` has it.
"""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import Field, model_validator

from broker.config_types import AgentName, Bytes, Seconds, Section

Url = Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)]
Count = Annotated[int, Field(ge=0, le=10**9)]


class OAuthConfig(Section):
    token_url: str = Field(
        "",
        pattern=r"^(https?://.+)?$",
        description="Token endpoint (RFC 6749) that renews users' token sets. Empty: this provider has none.",
    )
    client_id: str = Field("", description="Client that the token sets were issued to.")
    client_secret_file: str = Field("", description="File with the client's secret, where it has one; 0600.")
    body: Literal["form", "json"] = Field("form", description="How the endpoint is asked; form is the standard.")
    headers: dict[str, str] = Field(
        {}, description="Sent with every call beside the token. Filled in: {account_id} of the token set."
    )


class LimitConfig(Section):
    concurrency: Count = Field(0, description="Calls at once. 0: no limit, here and below.")
    interval_s: float = Field(0.0, ge=0, le=3600, description="Least time between the starts of two calls.")
    rpm: Count = Field(0, description="Calls a minute.")
    tpm: Count = Field(
        0, description="Tokens a minute: reserved by the size of a request, settled with what the provider reports."
    )


DOCUMENT_001 = {"concurrency": 6, "interval_s": 0.025}


class LimitsConfig(Section):
    profile: Literal["", "document-001"] = Field(
        "", description="Ready-made limits of the provider. document-001: 6 calls at once, 25 ms apart."
    )
    provider: LimitConfig = LimitConfig()
    credential: LimitConfig = LimitConfig()
    user: LimitConfig = LimitConfig()
    sandbox: LimitConfig = LimitConfig()
    waiting: int = Field(256, ge=0, le=100_000, description="Calls that may wait; one more is answered 429.")
    wait_s: Seconds = Field(30.0, description="A call that has waited for so long is answered 429.")

    @model_validator(mode="after")
    def _profile(self) -> LimitsConfig:
        if self.profile == "document-001":
            named = {key: getattr(self.provider, key) for key in self.provider.model_fields_set}
            object.__setattr__(self, "provider", LimitConfig.model_validate({**DOCUMENT_001, **named}))
        return self


class ResponseCacheConfig(Section):
    enabled: bool = Field(False, description="Answers equal requests with the answer that was there before.")
    ttl_s: Seconds = Field(300.0, description="How long answers of a model are kept.")
    list_ttl_s: Seconds = Field(60.0, description="How long lists of models and the like are kept.")
    with_tools: bool = Field(False, description="Requests that offer tools are answered so too.")
    with_randomness: bool = Field(False, description="Requests whose temperature is not 0 are answered so too.")
    max_entry_bytes: Bytes = Field(2**20, description="Larger answers are not kept.")
    prewarm_file: str = Field(
        "", description="Requests and answers to begin with, one JSON object a line: target, body, response."
    )


class ProviderConfig(Section):
    kind: Literal["anthropic", "openai", "gemini", "ollama"]
    base_url: str = Field("", pattern=r"^(https?://[^\s]+)?$", description="Where calls go.")
    upstreams: tuple[Url, ...] = Field(
        (), max_length=32, description="Several servers instead of base_url: the one with the fewest calls is asked."
    )
    credential_file: str = Field("", description="File with the API key; 0600. Read again when it changes.")
    credential_files: tuple[str, ...] = Field(
        (), max_length=64, description="Several keys instead: shared out evenly; one that is refused with 429 rests."
    )
    ca_file: str = Field("", description="PEM bundle trusted for this provider. Default: the system's.")
    websocket: bool = Field(False, description="Calls may be WebSockets; else an upgrade is answered 426 at once.")
    keep_alive: bool = Field(True, description="Connections are kept and shared.")
    prewarm: int = Field(2, ge=0, le=64, description="Connections opened ahead to each server, from the start on.")
    max_connections: int = Field(256, ge=1, le=10_000, description="Connections to each server; more calls wait.")
    max_fails: int = Field(5, ge=1, le=1000, description="Failures in a row after which a server is not asked.")
    fail_timeout_s: Seconds = Field(60.0, description="Time after which it is tried again, with one call.")
    health_path: str = Field(
        "", pattern=r"^(/[!-~]*)?$", description="Asked of each server to see whether it lives. Empty: it is not asked."
    )
    health_interval_s: Seconds = Field(10.0, description="Time between two such looks.")
    retries: int = Field(
        1, ge=0, le=10, description="A call that failed before its answer began is sent so often again."
    )
    retry_within_s: Seconds = Field(15.0, description="No call is sent again later than this.")
    fallback: tuple[AgentName, ...] = Field(
        (), max_length=8, description="Providers of the same kind that are asked when no server of this one answers."
    )
    coalesce: bool = Field(False, description="Equal requests that are under way at once share one answer.")
    batch_s: float = Field(
        0.0, ge=0, le=1, description="Requests for embeddings wait so long to be sent together. 0: they do not."
    )
    batch_size: int = Field(64, ge=2, le=2048, description="Inputs in one such request at most.")
    preload: tuple[str, ...] = Field((), max_length=16, description="Ollama: models that are loaded ahead and kept.")
    preload_keep_alive: str = Field("24h", pattern=r"^-?[0-9]+[smh]?$", description="Ollama: how long they are kept.")
    limits: LimitsConfig = LimitsConfig()
    cache: ResponseCacheConfig = ResponseCacheConfig()
    oauth: OAuthConfig = OAuthConfig()

    @model_validator(mode="after")
    def _either(self) -> ProviderConfig:
        if bool(self.base_url) == bool(self.upstreams):
            raise ValueError("give either base_url or upstreams")
        if self.credential_file and self.credential_files:
            raise ValueError("give either credential_file or credential_files")
        if self.preload and self.kind != "ollama":
            raise ValueError("preload is for providers of kind ollama")
        return self

    @property
    def servers(self) -> tuple[str, ...]:
        """Base URLs, at least one."""
        return self.upstreams or (self.base_url,)


class CacheConfig(Section):
    backend: Literal["memory", "redis"] = Field("memory", description="Where answers are kept.")
    max_bytes: Bytes = Field(64 * 2**20, description="Memory for answers; the least used go first.")
    redis_url: str = Field(
        "", pattern=r"^((redis|rediss|unix)://[^\s]+)?$", description="Redis, where backend is redis."
    )
    redis_password_file: str = Field("", description="File with its password; 0600.")
    redis_timeout_s: Seconds = Field(0.05, description="A slower answer of Redis counts as none.")

    @model_validator(mode="after")
    def _no_secret(self) -> CacheConfig:
        url = urlsplit(self.redis_url)
        if url.password or "password" in parse_qs(url.query):
            raise ValueError("redis_url has a password in it; put that into the file of redis_password_file")
        return self


ModelPattern = Annotated[str, Field(pattern=r"^[^\x00-\x1f*]{0,100}\*?$", min_length=1)]
Usd = Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)]


class PriceConfig(Section):
    input: Usd = Field(0.0, description="USD for a million tokens of the prompt.")
    output: Usd = Field(0.0, description="For a million tokens that the model makes.")
    cache_read: Usd | None = Field(None, description="For those read from the provider's cache. Default: as input.")
    cache_write: Usd | None = Field(None, description="For those written to it. Default: as input.")


class BudgetsConfig(Section):
    period: Literal["day", "month"] = Field("month", description="Budgets are anew when it begins, in UTC.")
    user_usd: Usd = Field(0.0, description="What each user may spend in it. 0: any amount.")
    team_usd: Usd = Field(0.0, description="What each team may spend in it. 0: any amount.")


class GatewayConfig(Section):
    mode: Literal["child", "external"] = Field("child", description="Started by serve, or a unit of its own.")
    link: str = Field("{runtime_dir}/gateway.sock", description="Socket on which the broker awaits the gateway.")
    user: str = Field(
        "", description="User that an external gateway runs as, in a group with the broker. Empty: the broker's own."
    )
    connect_timeout_s: Seconds = Field(10.0, description="Connecting to a provider or an allowed host.")
    idle_timeout_s: Seconds = Field(600.0, description="A connection on which nothing moves is closed.")
    max_head_bytes: Bytes = Field(64 * 2**10, description="Largest request or response head.")
    max_connections_per_sandbox: int = Field(256, ge=1, description="Open connections of one sandbox.")
    allowed_hosts: tuple[str, ...] = Field(
        ("registry.npmjs.org", "pypi.org", "files.pythonhosted.org"),
        description="Hosts that package builds may CONNECT to, port 443.",
    )
    private_hosts: tuple[str, ...] = Field((), description="Allowed hosts that may resolve to a private address.")
    max_tunnels_per_sandbox: int = Field(128, ge=0, description="Tunnels that one sandbox has open at once. 0: any.")
    egress_bytes_per_hour: int = Field(
        0, ge=0, description="What one sandbox may send and receive in an hour, model calls excepted. 0: any."
    )
    dns_timeout_s: Seconds = Field(5.0, description="Deadline of a name look-up.")
    usage_days: int = Field(90, ge=1, le=3660, description="How long it is known who used what.")
    prices: dict[ModelPattern, PriceConfig] = Field(
        {}, max_length=1000, description="Prices by a model's name, or by how names begin: prefix*."
    )
    budgets: BudgetsConfig = BudgetsConfig()
    cache: CacheConfig = CacheConfig()
    providers: dict[AgentName, ProviderConfig] = Field({}, description="Model providers by name.")

    @model_validator(mode="after")
    def _fallbacks(self) -> GatewayConfig:
        for name, provider in self.providers.items():
            for other in provider.fallback:
                if other not in self.providers or other == name:
                    raise ValueError(f"providers.{name}.fallback: {other!r} is no other provider")
                if self.providers[other].kind != provider.kind:
                    raise ValueError(f"providers.{name}.fallback: {other!r} is of another kind")
        if self.cache.backend == "redis" and not self.cache.redis_url:
            raise ValueError("cache.redis_url is empty")
        return self
