"""Metrics of calls, with the names of the conventions."""

from __future__ import annotations

from typing import Any

from broker.config_gateway import GatewayConfig, PriceConfig, ProviderConfig, ResponseCacheConfig
from broker.metrics import REGISTRY
from broker.session.usage_metrics import MAX_MODELS, UsageMetrics
from tests.unit.broker.gateway.test_usage_log import record

CACHED = ProviderConfig(kind="gemini", base_url="http://x", cache=ResponseCacheConfig(enabled=True))
SETTINGS = GatewayConfig(providers={"um": ProviderConfig(kind="openai", base_url="http://x"), "um-g": CACHED})


def value(name: str, model: str = "m", operation: str = "chat", provider: str = "um", **labels: str) -> float:
    about = {"gen_ai_provider_name": provider, "gen_ai_request_model": model, "gen_ai_operation_name": operation}
    return REGISTRY.get_sample_value(name, about | labels) or 0.0


def plain(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


def observe(into: UsageMetrics, cost: float = 0.0, **changes: Any) -> None:
    into.observe(SETTINGS, record(**{"provider": "um", "model": "m", **changes}), cost)


def test_a_call_is_seen_in_every_metric() -> None:
    into = UsageMetrics()
    observe(into, 0.5, duration_s=3.0, queue_s=0.5, ttft_s=1.0, input=100, output=21, attempts=3)
    assert value("gen_ai_client_operation_duration_seconds_sum", error_type="") == 3.0
    assert value("gen_ai_server_time_to_first_token_seconds_sum") == 0.5
    assert value("gen_ai_server_time_per_output_token_seconds_sum") == 0.1
    assert value("gen_ai_client_token_usage_sum", gen_ai_token_type="input") == 100
    assert value("gen_ai_client_token_usage_sum", gen_ai_token_type="output") == 21
    assert plain("cortex_gateway_queue_seconds_sum", provider="um") == 0.5
    assert plain("cortex_gateway_cost_usd_total", provider="um", model="m") == 0.5
    assert plain("cortex_gateway_retries_total", provider="um") == 2


def test_an_estimate_says_nothing_of_the_time_a_token_takes() -> None:
    observe(UsageMetrics(), model="about", duration_s=3.0, ttft_s=1.0, input=100, output=21, estimated=True)
    assert value("gen_ai_client_token_usage_sum", "about", gen_ai_token_type="output") == 21
    assert value("gen_ai_server_time_per_output_token_seconds_count", "about") == 0


def test_errors_say_of_what_kind() -> None:
    into = UsageMetrics()
    observe(into, model="e", ttft_s=None)
    for outcome, status in (("error", 500), ("ok", 400), ("cut", 200), ("gone", 200)):
        observe(into, model="e", outcome=outcome, status=status, ttft_s=1.0)
    for error in ("500", "400", "cut", "gone"):
        assert value("gen_ai_client_operation_duration_seconds_count", "e", error_type=error) == 1
    assert value("gen_ai_server_time_to_first_token_seconds_count", "e") == 0


def test_answers_out_of_the_cache_are_counted_and_use_no_tokens() -> None:
    into = UsageMetrics()
    before = [plain("cortex_gateway_cache_total", result=result) for result in ("hit", "miss")]
    observe(into, provider="um-g", cached="hit", input=9, output=9)
    observe(into, provider="um-g", input=5)
    # Its cache is off.
    observe(into, model="q")
    assert [plain("cortex_gateway_cache_total", result=result) for result in ("hit", "miss")] == [
        before[0] + 1,
        before[1] + 1,
    ]
    found = value("gen_ai_client_token_usage_sum", "m", "generate_content", "um-g", gen_ai_token_type="input")
    assert found == 5


def test_models_that_anybody_may_name_are_bounded() -> None:
    into = UsageMetrics()
    for number in range(MAX_MODELS + 10):
        observe(into, model=f"junk-{number}")
    observe(into, model="junk-0")
    count = "gen_ai_client_operation_duration_seconds_count"
    assert value(count, "other", error_type="") == 10
    assert value(count, "junk-0", error_type="") == 2


def test_what_never_answered_takes_no_label_from_what_does() -> None:
    into = UsageMetrics()
    for number in range(MAX_MODELS + 10):
        observe(into, model=f"none-{number}", outcome="error", status=404)
    observe(into, model="serves")
    count = "gen_ai_client_operation_duration_seconds_count"
    assert value(count, "none-0", error_type="404") == 0
    assert value(count, "other", error_type="404") == MAX_MODELS + 10
    assert value(count, "serves", error_type="") == 1


def test_a_model_with_a_price_is_known_before_it_answers() -> None:
    into = UsageMetrics()
    settings = SETTINGS.model_copy(update={"prices": {"dear-*": PriceConfig(input=1, output=1)}})
    into.observe(settings, record(provider="um", model="dear-1", outcome="error", status=500), 0.0)
    assert value("gen_ai_client_operation_duration_seconds_count", "dear-1", error_type="500") == 1


def test_what_is_no_call_to_a_model_is_not_in_the_conventions_metrics() -> None:
    into = UsageMetrics()
    observe(into, model="z", endpoint="list")
    observe(into, model="z", endpoint="embed", input=3)
    assert value("gen_ai_client_operation_duration_seconds_count", "z", error_type="") == 0
    assert value("gen_ai_client_operation_duration_seconds_count", "z", "embeddings", error_type="") == 1
