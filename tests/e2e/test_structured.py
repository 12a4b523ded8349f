"""Structured output through the whole engine: a model that knows nothing must still answer as it was asked to.

The model is random and small, its vocabulary is that of the demo model; what it would say is far from any grammar.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers

from manylora.server.config import EngineConfig, ServeConfig
from manylora.server.engine.grammar.sources import GrammarSpec
from manylora.server.engine.request import FinishEvent, Request, SamplingParams, TokenEvent
from manylora.server.serving import Running, build
from tests.checkpoints import SIZES
from tests.e2e.random_grammars import is_valid, random_spec
from tests.engine.conftest import smollm2_tokenizer

__all__ = ["smollm2_tokenizer"]  # a fixture

COUNT = 500
MAX_TOKENS = 600


@pytest.fixture(scope="module")
def running(smollm2_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("structured")
    torch.manual_seed(1)
    sizes = {**SIZES, "vocab_size": 49_160, "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": [2, 0]}
    config = transformers.AutoConfig.for_model("llama", **sizes, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    smollm2_tokenizer.save_pretrained(folder)
    made = build(
        ServeConfig(model=str(folder), cache_dir=folder / "cache", engine=EngineConfig(device="cpu", max_rows=32)),
        progress=False,
    )
    made.engine.start()
    yield made
    asyncio.run(made.close())


Result = tuple[TokenEvent, FinishEvent]


def ask(running: Running, wanted: Sequence[tuple[GrammarSpec | None, SamplingParams]]) -> list[Result]:
    """All at once."""
    assert running.grammars is not None
    grammars = [None if spec is None else running.grammars.compile(spec) for spec, _ in wanted]

    async def main() -> list[Result]:
        streams = []
        for number, ((_, params), grammar) in enumerate(zip(wanted, grammars, strict=True)):
            constraint = None if grammar is None else grammar.start()
            prompt = [1, 100 + number % 7, 2000 + number]
            streams.append(running.engine.submit(Request(f"r{number}", prompt, params, constraint=constraint)))
        return [await stream.result() for stream in streams]

    return asyncio.run(asyncio.wait_for(main(), 240))


@pytest.mark.slow
def test_every_output_is_valid_and_the_rows_beside_are_as_without_them(running: Running) -> None:
    rng = random.Random(7)
    free: list[tuple[GrammarSpec | None, SamplingParams]] = [
        (None, SamplingParams(max_tokens=30, seed=i, temperature=i % 3 / 2, top_p=1 - i % 2 / 5, logprobs=3))
        for i in range(24)
    ]
    alone = ask(running, free)

    specs = [random_spec(rng) for _ in range(COUNT)]
    wanted: list[tuple[GrammarSpec | None, SamplingParams]] = [
        (spec, SamplingParams(max_tokens=MAX_TOKENS, seed=i, temperature=1.0, top_k=(0, 0, 5)[i % 3]))
        for i, spec in enumerate(specs)
    ]
    # The first rows keep their prompts, and have others beside them from their first step to their last.
    mixed = ask(running, [*free, *wanted])
    for (tokens, finish), (expected, expected_finish) in zip(mixed, alone, strict=False):
        assert tokens.token_ids == expected.token_ids
        assert tokens.logprobs == expected.logprobs, "another rounding"
        assert finish == expected_finish
    wrong = []
    for spec, (tokens, finish) in zip(specs, mixed[len(free) :], strict=True):
        if finish.reason != "stop" or not is_valid(spec, tokens.text):
            wrong.append((spec.text, tokens.text, finish.reason, finish.error))
    assert wrong == []
    running.engine.call(running.engine._loop._scheduler.check_integrity).result(30)


def test_json_ends_although_the_model_would_not(running: Running) -> None:
    """A bias towards whitespace, which would fill max_tokens were it not bounded."""
    tokenizer = running.serving.tokenizer
    spaces = [
        t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) and not tokenizer.token_bytes(t).strip()
    ]
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0},
                                               "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    params = SamplingParams(max_tokens=120, temperature=0.0, logit_bias=dict.fromkeys(spaces, 100.0))
    ((tokens, finish),) = ask(running, [(GrammarSpec("json_schema", json.dumps(schema)), params)])
    assert finish.reason == "stop", tokens.text
    assert json.loads(tokens.text).keys() == {"a", "b"}
    assert tokens.text.count(" ") > 100, "it took what it could"


def test_rows_of_padding_and_special_tokens_are_never_drawn(running: Running) -> None:
    """lm_head has 8 rows more than the tokenizer has tokens; with a bias they would win."""
    bias = dict.fromkeys([*range(17), *range(49_152, 49_160)], 100.0)
    params = SamplingParams(max_tokens=30, temperature=1.0, logit_bias=bias, seed=1)
    free, bound = ask(running, [(None, params), (GrammarSpec("regex", "(?s:.){5,20}"), params)])
    assert set(free[0].token_ids) <= bias.keys()
    *drawn, last = bound[0].token_ids
    assert not bias.keys() & set(drawn)
    assert last in (0, 2) or last not in bias
    assert 5 <= len(bound[0].text) <= 20
