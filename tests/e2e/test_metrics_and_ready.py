"""What operators look at: ``/health``, ``/ready``, ``/metrics`` and the log, on a server that has really served
something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import dashboard
from tests.e2e.adapters import host_bytes, write_adapter
from tests.e2e.server_process import BASE, Server, complete, demo_flags, greedy, put_adapter, serving, wait_for

pytestmark = pytest.mark.timeout(900)

PROMPT = "The best way to cook an egg is"

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metrics")


@pytest.fixture(scope="module")
def server(root: Path, base_cache: Path) -> Iterator[Server]:
    flags = [*demo_flags(base_cache), "--port", "0", "--adapter-root", str(root), "--max-device-adapters", "4"]
    flags += ["--log-format", "json"]
    with serving(root / "server.log", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def scrape(client: httpx.Client) -> Samples:
    """Every sample of ``/metrics``, by name and sorted labels, as Prometheus itself parses them."""
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    """The one sample of this name that has these labels among its own."""
    found = [v for (n, own), v in samples.items() if n == name and labels.items() <= dict(own).items()]
    assert len(found) == 1, f"{name} {labels}: {found}"
    return found[0]


def label(samples: Samples, name: str, key: str) -> str:
    return next(dict(own)[key] for n, own in samples if n == name)


def mentions(samples: Samples, adapter: str) -> set[str]:
    """Names of the series that have ``adapter`` in a label."""
    return {name for name, own in samples if any(adapter in text.split(",") for _, text in own)}


def test_health_and_ready(client: httpx.Client) -> None:
    health, ready = client.get("/health"), client.get("/ready")
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


def test_the_promised_names_are_there_and_count(client: httpx.Client) -> None:
    before = scrape(client)
    assert complete(client, greedy(BASE, PROMPT, 5)).status == 200
    after = scrape(client)

    def grown(name: str, **labels: str) -> float:
        labels = {"model_name": BASE, **labels}
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("vllm:generation_tokens_total") == 5
    assert grown("vllm:prompt_tokens_total") == 8
    assert value(after, "vllm:request_success_total", model_name=BASE, finished_reason="length") >= 1
    for name, count in (
        ("vllm:time_to_first_token_seconds", 1),
        ("vllm:inter_token_latency_seconds", 4),
        ("vllm:e2e_request_latency_seconds", 1),
        ("vllm:request_queue_time_seconds", 1),
        ("vllm:request_prefill_time_seconds", 1),
        ("vllm:request_decode_time_seconds", 1),
    ):
        assert grown(f"{name}_count") == count, name
        assert grown(f"{name}_sum") >= 0
        assert grown(f"{name}_bucket", le="+Inf") == count
    for gauge in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        assert value(after, gauge, model_name=BASE) == 0
    assert value(after, "vllm:lora_requests_info", max_lora="4") > 1e9
    for name in ("manylora_step_seconds", "manylora_step_rows", "manylora_step_distinct_adapters"):
        assert any(n == f"{name}_count" for n, _ in after), name


def test_series_of_an_adapter_come_with_its_use_and_go_with_it(client: httpx.Client, root: Path) -> None:
    source = write_adapter(root / "visitor", seed=1)
    assert not mentions(scrape(client), "visitor")
    loaded = put_adapter(client, "visitor", source)
    assert (loaded["tier"], loaded["bytes"], loaded["ranks"]) == ("host", host_bytes(4), [4])
    for _ in range(2):
        assert complete(client, greedy("visitor", PROMPT, 5)).status == 200

    used = scrape(client)
    assert value(used, "manylora_adapter_generation_tokens_total", adapter="visitor") == 10
    assert value(used, "manylora_adapter_prompt_tokens_total", adapter="visitor") == 16
    assert value(used, "manylora_adapter_requests_total", adapter="visitor", finished_reason="length") == 2
    assert value(used, "manylora_adapter_queue_seconds_count", adapter="visitor") == 2
    assert "visitor" in label(used, "vllm:lora_requests_info", "running_lora_adapters").split(",")
    assert value(used, "manylora_slots_used") == 1
    shown = client.get("/v1/adapters/visitor").json()
    assert (shown["tier"], shown["prompt_tokens"], shown["generation_tokens"]) == ("device", 16, 10)
    assert shown["requests_in_flight"] == 0

    assert client.delete("/v1/adapters/visitor").json() == {
        "object": "adapter.deleted",
        "name": "visitor",
        "deleted": True,
    }
    # The step loop clears the slot and the series, between two steps.
    wait_for(lambda: not mentions(scrape(client), "visitor"), 60, "the adapter's series to go")
    assert value(scrape(client), "manylora_slots_used") == 0
    assert client.get("/v1/adapters/visitor").status_code == 404


def test_what_is_loaded_and_refused_is_counted(client: httpx.Client, root: Path) -> None:
    broken = write_adapter(root / "broken", seed=2)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    before = value(scrape(client), "manylora_adapter_load_seconds_count", result="refused")
    refused = client.put("/v1/adapters/broken", json={"source": str(broken)})
    assert refused.status_code == 400
    assert "corrupt" in refused.json()["error"]["message"]
    after = scrape(client)
    assert value(after, "manylora_adapter_load_seconds_count", result="refused") == before + 1
    assert not mentions(after, "broken")


def test_the_dashboard_asks_for_nothing_else(client: httpx.Client, root: Path) -> None:
    put_adapter(client, "shown", write_adapter(root / "shown", seed=3))
    assert complete(client, greedy("shown", PROMPT, 2)).status == 200
    assert client.get("/v1/models").status_code == 200
    samples = dashboard.exposed(client.get("/metrics").text)
    asked_of = {one.metric for query in dashboard.queries() for one in dashboard.asked(query)}
    # The series of what has not happened here come when it does.
    missing = {name for name in asked_of if name not in samples}
    assert missing <= {"manylora_rejected_total"}
    assert {query: found for query in dashboard.queries() if (found := dashboard.unknown(query, samples))
            and not missing & set(found)} == {}  # fmt: skip


def test_every_line_of_the_log_is_json_and_a_request_has_one(client: httpx.Client, server: Server) -> None:
    body = greedy(BASE, PROMPT, 5, n=2, stream=True)
    with client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "the-one"}) as response:
        response.read()
    assert response.headers["x-request-id"] == "the-one"

    def lines() -> list[dict[str, object]]:
        found = [json.loads(line) for line in server.log_text().splitlines()]
        return [line for line in found if line.get("request_id") == "the-one"]

    wait_for(lambda: bool(lines()), 10, "the request's line")
    [line] = lines()
    assert (line["logger"], line["route"], line["status"]) == ("manylora.access", "/v1/completions", 200)
    assert (line["model"], line["prompt_tokens"], line["completion_tokens"]) == (BASE, 8, 10)
    assert line["finish_reasons"] == ["length", "length"]
    for name in ("seconds", "queue_seconds", "ttft_seconds"):
        assert isinstance(line[name], float)
    assert line["queue_seconds"] <= line["ttft_seconds"] <= line["seconds"]  # type: ignore[operator]
    assert PROMPT not in server.log_text()
