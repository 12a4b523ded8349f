"""The app over a real engine with a tiny base: what a completion says of its prompt, and that every field of a request
does what it says, all the way down.

The base is a random checkpoint of transformers', quantised; the adapter PEFT's own, on lm_head too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.config import AdapterSpec, ApiConfig, EngineConfig, ServeConfig
from manylora.server.model.loader import load_base
from manylora.server.serving import Running, build, load_adapters
from tests.model.merged_model import double_model

BOS, EOS = 257, 258
VOCAB = 320
N_TOKENS = 260
"""Ids of the tokenizer; the model has more rows."""
BOUND = 2 * 112 * 2.0**-24
"""Of the largest logit: a log-probability is the difference of two, each as far off as tests/engine/test_composition.py
works out for a model of this depth."""


@dataclass
class Served:
    client: TestClient
    running: Running
    peft: Any
    """The same weights in float64."""

    def ask(self, **fields: Any) -> dict[str, Any]:
        body = {"model": "llama", "prompt": "Say it", "temperature": 0, "max_tokens": 8, **fields}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def choice(self, **fields: Any) -> dict[str, Any]:
        [choice] = self.ask(**fields)["choices"]
        found: dict[str, Any] = choice
        return found

    def ids(self, **fields: Any) -> list[int]:
        found: list[int] = self.choice(return_token_ids=True, **fields)["token_ids"]
        return found

    @torch.inference_mode()
    def exact(self, adapter: str | None, ids: list[int]) -> torch.Tensor:
        """Log-probabilities ``[tokens, vocab]`` after each token."""
        if adapter is None:
            with self.peft.disable_adapter():
                logits = self.peft(torch.tensor([ids])).logits[0]
        else:
            logits = self.peft(torch.tensor([ids])).logits[0]
        self.largest = float(logits.abs().max())
        found: torch.Tensor = logits.log_softmax(-1)
        return found


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("prompt-logprobs")
    base = load_base(str(checkpoints["llama"]), cache_dir=root / "cache", progress=False)
    weights = base.weights
    plain = double_model(
        base.spec,
        weights,
        lambda projection, layer: weights.projections[projection, layer].dequantize(),
        lambda name: weights.embed if name == "embed" else weights.output_embedding,
        weights.biases,
    )
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "down_proj", "lm_head"], task_type="CAUSAL_LM")
    peft = get_peft_model(plain.float(), config).eval()
    torch.manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape) * 0.2)
    peft.save_pretrained(str(root / "ada"))
    peft.double()  # the weights are fp32 numbers still
    settings = ServeConfig(
        model="llama",
        adapters=(AdapterSpec("ada", str(root / "ada")),),
        engine=EngineConfig(
            device="cpu",
            cpu_arithmetic="fp32",  # as transformers' side
            max_context=128,
            max_batch_tokens=24,
            max_rows=8,
            max_device_adapters=2,
        ),
        api=ApiConfig(adapter_roots=(root,)),
    )
    running = build(settings, base=base, progress=False)
    load_adapters(running, settings)
    running.engine.start()
    try:
        with TestClient(create_app(running.serving, settings.api), base_url="http://127.0.0.1:8000") as client:
            yield Served(client, running, peft)
            running.engine.call(lambda: running.engine._scheduler.check_integrity()).result(30)
            assert running.engine.stats().kv_pages_used == 0
    finally:
        asyncio.run(running.close())


PROMPT = "The quick brown fox jumps over a lazy dog, and a cat."


# --- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [None, "ada"])
def test_prompt_logprobs_are_those_of_transformers_and_peft(served: Served, adapter: str | None) -> None:
    choice = served.choice(
        model=adapter or "llama", prompt=PROMPT, prompt_logprobs=5, max_tokens=0, return_token_ids=True
    )
    ids = choice["prompt_token_ids"]
    exact = served.exact(adapter, ids)
    tolerance = BOUND * served.largest
    assert choice["prompt_logprobs"][0] is None
    for i, given in enumerate(choice["prompt_logprobs"][1:]):
        assert 5 <= len(given) <= 6
        for token, one in given.items():
            assert one["logprob"] == pytest.approx(float(exact[i, int(token)]), abs=tolerance)
            better = int((exact[i] > exact[i, int(token)] + tolerance).sum())
            worse = int((exact[i] < exact[i, int(token)] - tolerance).sum())
            assert better < one["rank"] <= VOCAB - worse
        assert str(ids[i + 1]) in given
    # The comparison would be empty if the adapter changed nothing.
    other = served.exact("ada" if adapter is None else None, ids)
    assert float((other - exact).abs().max()) > 100 * tolerance


@pytest.mark.parametrize("adapter", ["llama", "ada"])
def test_echo_says_of_a_text_what_was_said_when_it_was_generated(served: Served, adapter: str) -> None:
    """To the bit, through JSON and back: in one piece or many, streamed or not, beside others."""
    # Not the rows that the model has beyond its tokens: those cannot be in a prompt.
    drawn = {"max_tokens": 40, "logprobs": 3, "allowed_token_ids": [*range(EOS)], "return_token_ids": True}
    first = served.choice(model=adapter, prompt=PROMPT, **drawn)
    text = [*first["prompt_token_ids"], *first["token_ids"]]
    whole = served.choice(model=adapter, prompt=text, max_tokens=0, echo=True, logprobs=3)
    assert (whole["finish_reason"], whole["stop_reason"]) == ("length", None)
    n = len(first["prompt_token_ids"])
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        assert whole["logprobs"][key][n:] == first["logprobs"][key]
    assert whole["logprobs"]["token_logprobs"][0] is None
    assert None not in whole["logprobs"]["token_logprobs"][1:]
    # The same prompt many times at once, and each the same; with a token generated, the same and one more.
    many = served.ask(model=adapter, prompt=[text] * 12, max_tokens=1, echo=True, logprobs=3)["choices"]
    for choice in many:
        assert choice["text"].startswith(whole["text"])
        for key, values in whole["logprobs"].items():
            assert choice["logprobs"][key][:-1] == values
    body = {"model": adapter, "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 3, "stream": True}
    response = served.client.post("/v1/completions", json=body)
    frames = [line.removeprefix("data: ") for line in response.text.split("\n\n")]
    assert frames[-2:] == ["[DONE]", ""]
    streamed = json.loads(frames[0])["choices"][0]
    assert (streamed["text"], streamed["logprobs"]) == (whole["text"], whole["logprobs"])


def test_an_evaluation_harness_gets_what_it_looks_for(served: Served) -> None:
    """lm-evaluation-harness (``local-completions``) sends batches of token ids with ``max_tokens`` 1, cuts the token
    that is generated off, and takes the sum of what follows the context and whether each of it is the likeliest."""
    questions = [([BOS, *range(40, 60)], [7, 8, 9]), ([BOS, 5], [30]), ([BOS, *range(100, 130)], [9, 9])]
    answer = served.ask(
        model="ada", prompt=[[*context, *target] for context, target in questions], max_tokens=1, logprobs=1, echo=True,
        seed=1234,
    )  # fmt: skip
    for (context, target), choice in zip(questions, answer["choices"], strict=True):
        exact = served.exact("ada", [*context, *target])[len(context) - 1 : -1]
        given = choice["logprobs"]
        n = len(context)
        wanted = sum(float(row[token]) for row, token in zip(exact, target, strict=True))
        assert sum(given["token_logprobs"][n:-1]) == pytest.approx(wanted, abs=3 * BOUND * served.largest)
        likeliest = [max(top, key=top.get) for top in given["top_logprobs"][n:-1]]
        is_greedy = likeliest == given["tokens"][n:-1]
        assert is_greedy == (exact.argmax(-1).tolist() == target)
    # And where the target is what the model would say, it is found to be.
    said = served.choice(model="ada", prompt=[BOS, 5], max_tokens=3, allowed_token_ids=[*range(256)],
                         return_token_ids=True)["token_ids"]  # fmt: skip
    choice = served.choice(model="ada", prompt=[BOS, 5, *said], max_tokens=1, logprobs=20, echo=True)
    for token, top in zip(choice["logprobs"]["tokens"][2:-1], choice["logprobs"]["top_logprobs"][2:-1], strict=True):
        spelled = {name: value for name, value in top.items() if name and not name.startswith("<|")}
        assert max(spelled, key=spelled.__getitem__) == token


def test_chat_prompts_have_them_too(served: Served) -> None:
    body = {"model": "ada", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "prompt_logprobs": 1}
    response = served.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer = response.json()
    [same] = served.ask(model="ada", prompt="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", max_tokens=0,
                        prompt_logprobs=1)["choices"]  # fmt: skip
    assert answer["prompt_logprobs"] == same["prompt_logprobs"]


def test_offsets_are_places_in_the_text(served: Served) -> None:
    prompt = "<|im_start|>a é a<|im_end|>"
    choice = served.choice(prompt=prompt, max_tokens=6, echo=True, logprobs=0, ignore_eos=True)
    assert choice["text"].startswith(prompt)
    offsets = choice["logprobs"]["text_offset"]
    assert offsets[:3] == [0, 12, 13]
    assert offsets[-7] <= len(prompt) == offsets[-6]
    for token, at in zip(choice["logprobs"]["tokens"][:9], offsets, strict=False):
        assert token.startswith("bytes:") or choice["text"].startswith(token, at)


# --- every field, on the real engine ---------------------------------------------------------------------------------


def test_best_of_is_the_best_of_them(served: Served) -> None:
    drawn = [served.choice(temperature=1.0, seed=seed, logprobs=0) for seed in range(40, 46)]
    means = [sum(one["logprobs"]["token_logprobs"]) / len(one["logprobs"]["token_logprobs"]) for one in drawn]
    order = sorted(range(6), key=lambda i: -means[i])
    answer = served.ask(temperature=1.0, seed=40, best_of=6, n=2)
    assert [choice["text"] for choice in answer["choices"]] == [drawn[i]["text"] for i in order[:2]]
    lengths = [len(one["logprobs"]["tokens"]) for one in drawn]
    assert answer["usage"]["completion_tokens"] == sum(lengths)


def test_batches_of_token_ids(served: Served) -> None:
    prompts = [[BOS, 40, 41], [9], list(range(30))]
    together = served.ask(prompt=prompts, return_token_ids=True)
    assert together["usage"]["prompt_tokens"] == 34
    for prompt, choice in zip(prompts, together["choices"], strict=True):
        assert choice["prompt_token_ids"] == prompt
        assert choice["token_ids"] == served.ids(prompt=prompt)


def test_logit_bias(served: Served) -> None:
    free = served.ids()
    assert served.ids(logit_bias={str(free[0]): -100})[0] != free[0]
    assert served.ids(logit_bias={"65": 100}, ignore_eos=True) == [65] * 8


def test_the_end_of_a_sequence_min_tokens_and_ignore_eos(served: Served) -> None:
    at_once = served.choice(logit_bias={str(EOS): 100}, return_token_ids=True)
    assert (at_once["token_ids"], at_once["text"], at_once["finish_reason"]) == ([EOS], "", "stop")
    later = served.choice(logit_bias={str(EOS): 100}, min_tokens=3, return_token_ids=True)
    assert later["token_ids"][-1] == EOS
    assert EOS not in later["token_ids"][:-1]
    assert len(later["token_ids"]) == 4
    ignored = served.choice(logit_bias={str(EOS): 100}, ignore_eos=True, return_token_ids=True)
    assert (ignored["token_ids"], ignored["finish_reason"], ignored["text"]) == ([EOS] * 8, "length", "")
    shown = served.choice(logit_bias={str(EOS): 100}, ignore_eos=True, skip_special_tokens=False,
                          spaces_between_special_tokens=False)  # fmt: skip
    assert shown["text"] == "<|im_end|>" * 8


def test_stop_tokens_and_strings(served: Served) -> None:
    fields = {"logit_bias": {"65": 100}, "ignore_eos": True}
    letter = served.choice(**fields)["text"][0]
    plain = served.choice(**fields, stop_token_ids=[65], return_token_ids=True)
    assert (plain["text"], plain["stop_reason"], plain["token_ids"]) == ("", 65, [65])
    kept = served.choice(**fields, stop_token_ids=[65], include_stop_str_in_output=True)
    assert (kept["text"], kept["stop_reason"], kept["finish_reason"]) == (letter, 65, "stop")
    for include, text in ((False, ""), (True, letter * 3)):
        choice = served.choice(**fields, stop=[letter * 3], include_stop_str_in_output=include)
        assert (choice["text"], choice["stop_reason"]) == (text, letter * 3)
    waited = served.choice(**fields, stop_token_ids=[65], min_tokens=2, return_token_ids=True)
    assert 65 not in waited["token_ids"][:2], "until then it is banned, as the end of the sequence is"


def test_truncated_prompts(served: Served) -> None:
    ids = served.choice(prompt=PROMPT, max_tokens=0, echo=True, return_token_ids=True)["prompt_token_ids"]
    cut = served.ask(prompt=PROMPT, truncate_prompt_tokens=9, return_token_ids=True)
    assert cut["usage"]["prompt_tokens"] == 9
    assert cut["choices"][0]["prompt_token_ids"] == ids[-9:]
    assert cut["choices"][0]["token_ids"] == served.ids(prompt=ids[-9:])
    assert served.ask(prompt=[7] * 500, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 120
    usage = served.ask(prompt=[7] * 500, truncate_prompt_tokens=-1, max_tokens=0, echo=True)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (128, 0, 128)


def test_penalties_change_what_they_should(served: Served) -> None:
    """Of two tokens one is a little likelier each time, until it has been said often enough."""
    fields = {"allowed_token_ids": [65, 66], "max_tokens": 30}
    gap = served.choice(allowed_token_ids=[65], logprobs=0, max_tokens=1)["logprobs"]["token_logprobs"][0]
    gap -= served.choice(allowed_token_ids=[66], logprobs=0, max_tokens=1)["logprobs"]["token_logprobs"][0]
    fields["logit_bias"] = {"65": 1.5 - gap}
    base = served.ids(**fields)
    assert base[0] == 65
    for penalty in ({"repetition_penalty": 50.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert served.ids(**fields, **penalty)[:2] == [65, 66], penalty
    assert served.ids(**fields, frequency_penalty=-2.0) == [65] * 30


def test_seeds_and_truncated_distributions(served: Served) -> None:
    def draw(seed: int, **fields: Any) -> list[int]:
        return served.ids(temperature=1.0, seed=seed, ignore_eos=True, max_tokens=12, **fields)

    greedy = served.ids(ignore_eos=True, max_tokens=12)
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, top_k=1) == draw(2, top_p=1e-9) == draw(3, min_p=1.0) == greedy


def test_allowed_tokens(served: Served) -> None:
    for temperature in (0, 1.0):
        ids = served.ids(allowed_token_ids=[65, 66, 200], temperature=temperature, max_tokens=30, seed=1)
        assert set(ids) <= {65, 66, 200}
        assert len(ids) == 30, "an end was not among them"
    assert served.ids(allowed_token_ids=[EOS]) == [EOS]
    # Log-probabilities stay the model's own: of what it would have said, what may be said is little.
    choice = served.choice(allowed_token_ids=[65, 66], logprobs=0)
    free = served.choice(prompt_logprobs=0, max_tokens=0)
    assert free["prompt_logprobs"][0] is None
    assert all(value < -1 for value in choice["logprobs"]["token_logprobs"])


def test_bad_words(served: Served) -> None:
    fields: dict[str, Any] = {"logit_bias": {"65": 100}, "ignore_eos": True}
    letter = served.choice(**fields)["text"][0]
    assert 65 not in served.ids(**fields, bad_words=[letter])
    ids = served.ids(**fields, bad_words=[letter * 2])
    assert ids[::2] == [65] * 4
    assert 65 not in ids[1::2]


def test_n_choices_and_streams_agree(served: Served) -> None:
    fields = {"temperature": 1.0, "seed": 11, "n": 3, "logprobs": 1, "max_tokens": 10, "echo": True}
    whole = served.ask(**fields)["choices"]
    body = {"model": "llama", "prompt": "Say it", **fields, "stream": True}
    response = served.client.post("/v1/completions", json=body)
    texts, tokens = [""] * 3, [[], [], []]  # type: ignore[var-annotated]
    for line in response.text.split("\n\n")[:-2]:
        for choice in json.loads(line.removeprefix("data: "))["choices"]:
            texts[choice["index"]] += choice["text"]
            if choice["logprobs"] is not None:
                tokens[choice["index"]] += choice["logprobs"]["token_logprobs"]
    assert texts == [choice["text"] for choice in whole]
    assert tokens == [choice["logprobs"]["token_logprobs"] for choice in whole]
