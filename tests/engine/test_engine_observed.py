"""What the engine tells of its requests besides their events: whom they were for, and their ids when they fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from manylora.server.engine.metrics import Metrics
from manylora.server.engine.request import StepPlan
from manylora.server.engine.tenant import Tenant
from manylora.server.engine.usage_series import ANYBODY
from tests.engine.harness import Setup, go, output, running
from tests.fakes import request


def generated(metrics: Metrics) -> dict[str, float]:
    """Tokens, by tenant."""
    return {
        sample.labels["tenant"]: sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
        if sample.name == "manylora_tenant_generation_tokens_total"
    }


def test_requests_are_counted_for_their_tenant() -> None:
    async def main() -> None:
        async with running(Setup()) as setup:
            for name, n in (("acme", 3), ("acme", 4), ("zeta", 5)):
                one = request(f"{name}-{n}", max_tokens=n, ignore_eos=True)
                await output(setup, replace(one, tenant=Tenant(name)))
            await output(setup, request("anybody's", max_tokens=2, ignore_eos=True))
            assert generated(setup.metrics) == {"acme": 7, "zeta": 5, ANYBODY: 2}

    go(main())


def test_a_failing_step_is_logged_with_the_ids_of_its_requests(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_plan: StepPlan) -> None:
        raise RuntimeError("the device is on fire")

    async def main() -> None:
        async with running(Setup(before_step=fail)) as setup:
            _, finish = await output(setup, request("trace-42/cmpl-1-0"))
            assert finish.reason == "error"

    go(main())
    [failed, ended] = [record for record in caplog.records if "trace-42/cmpl-1-0" in record.getMessage()]
    assert (failed.levelname, bool(failed.exc_info)) == ("ERROR", True)
    assert ended.getMessage().startswith("request trace-42/cmpl-1-0 ended with an error: ")
