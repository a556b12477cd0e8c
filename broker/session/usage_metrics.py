"""Metrics of calls to models, from the gateway's records; names of the OpenTelemetry conventions for generative AI."""

from __future__ import annotations

from broker import metrics
from broker.config_gateway import GatewayConfig, ProviderConfig
from broker.gateway.records import Record
from broker.session.model_names import OTHER
from broker.session.prices import UNCHARGED, price_of

MAX_MODELS = 64
"""That have a label of their own: any sandbox can name as many as it likes."""


class UsageMetrics:
    def __init__(self) -> None:
        self._models: set[str] = set()

    def observe(self, settings: GatewayConfig, call: Record, cost: float) -> None:
        """Takes in a call, once each."""
        provider = settings.providers.get(call.provider)
        if provider is not None and (provider.cache.enabled or provider.coalesce or provider.batch_s):
            metrics.GATEWAY_CACHE.labels(call.cached or "miss").inc()
        metrics.GATEWAY_QUEUE.labels(call.provider).observe(call.queue_s)
        if call.attempts > 1:
            metrics.GATEWAY_RETRIES.labels(call.provider).inc(call.attempts - 1)
        operation = _operation(call, provider)
        if operation is None:
            return
        failed = call.outcome != "ok" or call.status >= 400
        model = self._label(call.model, real=not failed or price_of(settings.prices, call.model) is not None)
        about = (call.provider, model, operation)
        error = (str(call.status) if call.outcome in ("ok", "error") else call.outcome) if failed else ""
        metrics.GEN_AI_DURATION.labels(*about, error).observe(call.duration_s)
        if call.cached in UNCHARGED:
            return
        metrics.GATEWAY_COST.labels(call.provider, model).inc(cost)
        if call.input is not None:
            metrics.GEN_AI_TOKENS.labels(*about, "input").observe(call.input)
        if call.output is not None:
            metrics.GEN_AI_TOKENS.labels(*about, "output").observe(call.output)
        if not failed and call.ttft_s is not None and call.endpoint == "generate":
            metrics.GEN_AI_FIRST_TOKEN.labels(*about).observe(max(0.0, call.ttft_s - call.queue_s))
            said = None if call.estimated else call.output
            if said is not None and said > 1 and call.duration_s > call.ttft_s:
                each = (call.duration_s - call.ttft_s) / (said - 1)
                metrics.GEN_AI_OUTPUT_TOKEN.labels(*about).observe(each)

    def _label(self, model: str, *, real: bool) -> str:
        """``real``: it has answered, or a price; another is known by its sandbox's word alone."""
        if model not in self._models:
            if not real or len(self._models) >= MAX_MODELS:
                return OTHER
            self._models.add(model)
        return model


def _operation(call: Record, provider: ProviderConfig | None) -> str | None:
    if call.endpoint == "embed":
        return "embeddings"
    if call.endpoint == "generate":
        return "generate_content" if provider is not None and provider.kind == "gemini" else "chat"
    return None
