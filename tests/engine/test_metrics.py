from __future__ import annotations

import time
from dataclasses import replace

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from manylora.server.engine.metrics import OTHER, EngineStats, Metrics
from manylora.server.engine.request import RequestTimes
from manylora.server.engine.usage_series import ANYBODY, TenantUsage
from tests.fakes import adapter

A, B = adapter("a"), adapter("b")
STATS = EngineStats(
    running=3,
    waiting=2,
    kv_pages_used=5,
    kv_pages_total=20,
    preemptions=4,
    slot_hits=6,
    slot_misses=7,
    max_slots=8,
    resident_adapters=("a", "b"),
    waiting_adapters=("c",),
)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = metrics.render().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics)[name, frozenset(labels.items())]


def end(metrics: Metrics, ref: object = None, reason: str = "stop", *, generated: int = 10, tenant: str = "") -> None:
    times = RequestTimes(arrived=100.0, scheduled=101.0, first_token=103.0, ended=110.0)
    metrics.request_ended(
        [] if ref is None else [ref],
        reason,
        times,
        prompt_tokens=5,
        generation_tokens=generated,
        tenant=tenant,
    )


def test_vllms_names_are_there_from_the_start() -> None:
    metrics = Metrics("base")
    metrics.bind(lambda: STATS)
    found = {(name, dict(labels).get("model_name")) for name, labels in samples(metrics)}
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:num_preemptions_total",
        *(
            f"vllm:{histogram}_seconds_{part}"
            for histogram in (
                "time_to_first_token",
                "inter_token_latency",
                "e2e_request_latency",
                "request_queue_time",
                "request_prefill_time",
                "request_decode_time",
            )
            for part in ("bucket", "sum", "count")
        ),
    ):
        assert (name, "base") in found, name


def test_gauges_are_read_when_scraped() -> None:
    metrics = Metrics("base")
    metrics.bind(lambda: STATS)
    assert value(metrics, "vllm:num_requests_running", model_name="base") == 3
    assert value(metrics, "vllm:num_requests_waiting", model_name="base") == 2
    assert value(metrics, "vllm:kv_cache_usage_perc", model_name="base") == 0.25
    assert value(metrics, "manylora_slots_used") == 2
    assert value(metrics, "manylora_slots") == 8
    assert value(metrics, "manylora_adapter_lookups_total", tier="device", result="hit") == 6
    assert value(metrics, "manylora_adapter_lookups_total", tier="device", result="miss") == 7
    info = value(
        metrics, "vllm:lora_requests_info", max_lora="8", running_lora_adapters="a,b", waiting_lora_adapters="c"
    )
    assert info == pytest.approx(time.time(), abs=60)


def test_a_request_is_counted_where_its_time_went() -> None:
    metrics = Metrics("base")
    metrics.first_token(3.0, prompt_tokens=5)
    metrics.inter_token(0.02)
    metrics.inter_token(0.02)
    end(metrics, reason="length")
    for name, seconds, count in (
        ("time_to_first_token", 3.0, 1),
        ("inter_token_latency", 0.04, 2),
        ("e2e_request_latency", 10.0, 1),
        ("request_queue_time", 1.0, 1),
        ("request_prefill_time", 2.0, 1),
        ("request_decode_time", 7.0, 1),
    ):
        assert value(metrics, f"vllm:{name}_seconds_sum", model_name="base") == pytest.approx(seconds), name
        assert value(metrics, f"vllm:{name}_seconds_count", model_name="base") == count, name
    assert value(metrics, "vllm:prompt_tokens_total", model_name="base") == 5
    assert value(metrics, "vllm:request_success_total", model_name="base", finished_reason="length") == 1


def test_a_composition_is_counted_for_each_of_its_adapters_and_once_in_all() -> None:
    metrics = Metrics("base")
    times = RequestTimes(arrived=100.0, scheduled=101.0, first_token=103.0, ended=110.0)
    metrics.request_ended([A, adapter("b")], "stop", times, prompt_tokens=5, generation_tokens=7)
    for name in ("a", "b"):
        assert metrics.adapter_tokens(name) == (5, 7)
        assert value(metrics, "manylora_adapter_requests_total", adapter=name, finished_reason="stop") == 1
        assert value(metrics, "manylora_adapter_queue_seconds_count", adapter=name) == 1
    assert value(metrics, "vllm:request_success_total", model_name="base", finished_reason="stop") == 1
    assert value(metrics, "vllm:request_queue_time_seconds_count", model_name="base") == 1


def test_a_request_that_never_ran_has_no_prefill_time() -> None:
    metrics = Metrics("base")
    times = RequestTimes(arrived=100.0, scheduled=None, first_token=None, ended=104.0)
    metrics.request_ended([A], "abort", times, prompt_tokens=5, generation_tokens=0)
    assert value(metrics, "vllm:request_queue_time_seconds_sum", model_name="base") == 4
    assert value(metrics, "vllm:request_prefill_time_seconds_count", model_name="base") == 0
    assert value(metrics, "manylora_adapter_prompt_tokens_total", adapter="a") == 0


def test_buckets_are_cumulative_and_include_their_bound() -> None:
    metrics = Metrics("base")
    for seconds in (0.01, 0.011, 1e9):
        metrics.inter_token(seconds)
    name = "vllm:inter_token_latency_seconds_bucket"
    assert value(metrics, name, model_name="base", le="0.01") == 1
    assert value(metrics, name, model_name="base", le="0.025") == 2
    assert value(metrics, name, model_name="base", le="80.0") == 2
    assert value(metrics, name, model_name="base", le="+Inf") == 3


@pytest.mark.parametrize(("prefill_rows", "phase"), [(0, "decode"), (2, "mixed"), (4, "prefill")])
def test_steps_by_phase(prefill_rows: int, phase: str) -> None:
    metrics = Metrics("base")
    metrics.step(0.5, rows=4, prefill_rows=prefill_rows, tokens=40, adapters=3, generated=4)
    assert value(metrics, "manylora_step_seconds_sum", phase=phase) == 0.5
    assert value(metrics, "manylora_step_rows_sum") == 4
    assert value(metrics, "manylora_step_tokens_sum") == 40
    assert value(metrics, "manylora_step_distinct_adapters_sum") == 3
    assert value(metrics, "vllm:generation_tokens_total", model_name="base") == 4


def test_series_of_an_adapter() -> None:
    metrics = Metrics("base")
    end(metrics, A)
    end(metrics, A, "length")
    end(metrics, B)
    end(metrics)
    assert value(metrics, "manylora_adapter_generation_tokens_total", adapter="a") == 20
    assert value(metrics, "manylora_adapter_prompt_tokens_total", adapter="a") == 10
    assert value(metrics, "manylora_adapter_requests_total", adapter="a", finished_reason="length") == 1
    assert value(metrics, "manylora_adapter_queue_seconds_count", adapter="a") == 2
    assert value(metrics, "manylora_adapter_queue_seconds_sum", adapter="a") == 2
    assert value(metrics, "manylora_adapter_generation_tokens_total", adapter="b") == 10


def test_series_go_with_the_last_version_of_a_name() -> None:
    metrics = Metrics("base")
    old, new = adapter("a", "1" * 64), adapter("a", "2" * 64)
    end(metrics, old)
    end(metrics, new)
    end(metrics, B)
    metrics.adapter_freed(old)
    assert value(metrics, "manylora_adapter_generation_tokens_total", adapter="a") == 20
    metrics.adapter_freed(new)
    metrics.adapter_freed(adapter("never-used"))
    left = {dict(labels)["adapter"] for _name, labels in samples(metrics) if "adapter" in dict(labels)}
    assert left == {"b"}


def test_the_number_of_series_is_bounded() -> None:
    metrics = Metrics("base", max_adapter_series=3)
    for i in range(10):
        end(metrics, adapter(f"n{i}"))
    names = [dict(labels)["adapter"] for name, labels in samples(metrics) if name.endswith("generation_tokens_total")
             and "adapter" in dict(labels)]  # fmt: skip
    assert sorted(names) == [OTHER, "n0", "n1", "n2"]
    assert value(metrics, "manylora_adapter_generation_tokens_total", adapter=OTHER) == 70


def test_loads() -> None:
    metrics = Metrics("base")
    metrics.adapter_loaded(0.5)
    metrics.adapter_loaded(0.1, refused=True)
    assert value(metrics, "manylora_adapter_load_seconds_sum", result="loaded") == 0.5
    assert value(metrics, "manylora_adapter_load_seconds_count", result="refused") == 1


def test_a_name_with_odd_characters_is_escaped() -> None:
    metrics = Metrics('ba"se\n\\')
    end(metrics)
    assert value(metrics, "vllm:prompt_tokens_total", model_name='ba"se\n\\') == 0


def test_nothing_is_registered_globally() -> None:
    Metrics("one")
    Metrics("two")
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith(("vllm", "manylora"))]


def test_the_prefix_cache() -> None:
    metrics = Metrics("base")
    metrics.bind(lambda: replace(STATS, prefix_queries=30, prefix_hits=12))
    assert value(metrics, "vllm:prefix_cache_queries_total", model_name="base") == 30
    assert value(metrics, "vllm:prefix_cache_hits_total", model_name="base") == 12
    assert (STATS.prefix_queries, STATS.prefix_hits) == (0, 0)


def tenants(metrics: Metrics) -> set[str]:
    return {dict(labels)["tenant"] for _name, labels in samples(metrics) if "tenant" in dict(labels)}


def test_series_of_a_tenant() -> None:
    metrics = Metrics("base")
    end(metrics, A, tenant="acme")
    end(metrics, tenant="acme", reason="length")
    end(metrics, B)
    assert value(metrics, "manylora_tenant_prompt_tokens_total", tenant="acme") == 10
    assert value(metrics, "manylora_tenant_generation_tokens_total", tenant="acme") == 20
    assert value(metrics, "manylora_tenant_requests_total", tenant="acme", finished_reason="length") == 1
    assert value(metrics, "manylora_tenant_queue_seconds_count", tenant="acme") == 2
    assert value(metrics, "manylora_tenant_queue_seconds_sum", tenant="acme") == 2
    assert value(metrics, "manylora_tenant_requests_total", tenant=ANYBODY, finished_reason="stop") == 1


def test_a_prompt_that_was_never_computed_is_not_counted_for_its_tenant() -> None:
    metrics = Metrics("base")
    times = RequestTimes(arrived=100.0, scheduled=None, first_token=None, ended=104.0)
    metrics.request_ended([], "abort", times, prompt_tokens=5, generation_tokens=0, tenant="acme")
    assert value(metrics, "manylora_tenant_prompt_tokens_total", tenant="acme") == 0


def test_the_number_of_tenants_is_bounded() -> None:
    metrics = Metrics("base", max_tenant_series=3)
    for i in range(10):
        end(metrics, tenant=f"t{i}")
    assert tenants(metrics) == {OTHER, "t0", "t1", "t2"}
    assert value(metrics, "manylora_tenant_generation_tokens_total", tenant=OTHER) == 70


def test_series_of_a_tenant_go_and_do_not_come_back_with_its_last_request() -> None:
    metrics = Metrics("base")
    for name in ("a", "b", ""):
        end(metrics, tenant=name)
    metrics.retain_tenants({"b", "c"})
    assert tenants(metrics) == {"b", ANYBODY}
    end(metrics, tenant="a")
    end(metrics, tenant="c")
    assert tenants(metrics) == {"b", "c", ANYBODY, OTHER}
    assert [metrics.tenant_label(name) for name in ("a", "b", "")] == [OTHER, "b", ANYBODY]


def test_a_file_of_more_tenants_than_may_have_series() -> None:
    metrics = Metrics("base", max_tenant_series=2)
    metrics.retain_tenants({"c", "a", "b"})
    for name in ("a", "b", "c"):
        end(metrics, tenant=name)
    assert tenants(metrics) == {"a", "b", OTHER}


def test_a_tenant_that_goes_while_its_request_is_being_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of keys is read on one thread and requests end on another."""
    usage = TenantUsage(limit=10)
    usage.of("a")

    def label(name: str) -> str:
        usage.retain(["b"])
        return name

    monkeypatch.setattr(usage, "label", label)
    usage.of("a").add("stop", 0.0, 1, 1)
    assert [sample.labels for family in usage.collect() for sample in family.samples] == []
