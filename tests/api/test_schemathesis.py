"""The application under requests that schemathesis makes from the document: valid ones, wrong ones, and the edges.

The same ones in every run. A route that is added is tested from the moment it is documented (and
``test_openapi.test_every_route_is_in_it`` sees to that). Besides schemathesis's own checks there is the one that every
test here is under (``tests.api.conformance``), which also reads the events of streams.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.python.asgi import ASGIClient, get_client
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    ignored_auth,
    positive_data_acceptance,
    unsupported_method,
)
from starlette.types import ASGIApp

from manylora.server.api.app import create_app
from manylora.server.config import ApiConfig
from tests.api.conformance import the_document
from tests.api.fakes import FakeEngine, make_serving

URL: Final = "http://127.0.0.1:8000"
KEYS: Final = {"Authorization": "Bearer admin"}
EXAMPLES: Final = 20
"""Requests of each kind for each operation; the edges come on top."""
PLAIN: Final = ("POST /v1/completions", "POST /v1/chat/completions", "POST /tokenize", "POST /detokenize")
"""Of these some that are valid must be answered, or all of this is about refusals."""
NAMES: Final = ("base", "alice", "base:org/bob")

SCHEMA = schemathesis.openapi.from_dict(copy.deepcopy(the_document()))
OPERATIONS: dict[str, Any] = {result.ok().label: result.ok() for result in SCHEMA.get_all_operations()}
MODES = {"valid": GenerationMode.POSITIVE, "wrong": GenerationMode.NEGATIVE}

EXCLUDED: Final = [
    # A valid request may well be refused: for a model that is not there, for fields that exclude each other.
    positive_data_acceptance,
    # What takes a key is in test_openapi.py and test_auth.py.
    ignored_auth,
]
OVERLAPPING: Final = ("/v1/adapters/unmerge", "/v1/adapters/{name}/merge")
"""To schemathesis paths of their own; here they are also what an adapter may be called (GET /v1/adapters/unmerge)."""


@pytest.fixture
def app(tmp_path: Path) -> Iterator[ASGIApp]:
    serving = make_serving(tmp_path)
    yield create_app(
        serving,
        ApiConfig(adapter_roots=(tmp_path,), api_keys=("user",), admin_key="admin", upload_dir=tmp_path / "uploads"),
    )
    assert isinstance(serving.engine, FakeEngine)
    assert serving.engine.n_live == 0
    assert serving.registry.counts().requests_in_flight == 0  # type: ignore[attr-defined]


@pytest.fixture
def client(app: ASGIApp, monkeypatch: pytest.MonkeyPatch) -> ASGIClient:
    monkeypatch.setattr(SCHEMA, "app", app)  # for checks that ask something themselves
    client = get_client(app)
    client.trust_env = False  # looking for proxies takes longer than the answer
    return client


def ask(client: ASGIClient, case: Case) -> int:
    response = case.call(session=client, base_url=URL, headers=KEYS)
    excluded = [*EXCLUDED, *([allow_header_conformance, unsupported_method] if case.path in OVERLAPPING else [])]
    case.validate_response(
        response, excluded_checks=excluded, headers=KEYS, transport_kwargs={"session": client, "base_url": URL}
    )
    return response.status_code


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label, operation in OPERATIONS.items()
        for mode in MODES
        # Of a request without a body, a name or a key nothing can be wrong.
        if mode == "valid" or operation.definition.raw["security"]
    ],
)
def test_generated(client: ASGIClient, label: str, mode: str) -> None:
    turn = itertools.count()
    seen: Counter[int] = Counter()

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=OPERATIONS[label].as_strategy(MODES[mode]))
    def run(case: Case) -> None:
        if mode == "valid":
            make_meaningful(case, next(turn))
        seen[ask(client, case)] += 1

    run()
    if mode == "valid" and label in PLAIN:
        assert seen[200] > 0, seen


def make_meaningful(case: Case, turn: int) -> None:
    """Names that exist, and few fields at a time, or all requests would be refused for the first thing that is odd."""
    for parameters in (case.path_parameters, case.body):
        for field in ("model", "name", "lora_name"):
            if isinstance(parameters, dict) and isinstance(parameters.get(field), str):
                parameters[field] = NAMES[turn % len(NAMES)]
    if isinstance(case.body, dict) and "model" in case.body:
        optional = sorted(case.body.keys() - {"model", "prompt", "messages", "tokens"})
        for field in optional:
            if optional.index(field) != turn % (len(optional) + 1):
                del case.body[field]


@pytest.mark.parametrize("label", OPERATIONS)
def test_edges(client: ASGIClient, label: str) -> None:
    """Each bound and each form of each field, and one step beyond it."""
    operation = OPERATIONS[label]
    generation = SCHEMA.config.generation_for(operation=operation)
    for case in SCHEMA.iter_coverage_cases(
        operation, generation_modes=list(MODES.values()), generation_config=generation
    ):
        ask(client, case)
