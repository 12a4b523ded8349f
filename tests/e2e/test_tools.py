"""The app over a real engine with a tiny random base, which would never call anything by itself: what is forced on it
is a call, in the format of the template that is used, with arguments that match their schema.

The base's template writes calls as Hermes does; an adapter's as Mistral does, whose mark is a special token.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from manylora.server.api.app import create_app
from manylora.server.config import AdapterSpec, ApiConfig, EngineConfig, ServeConfig
from manylora.server.model.loader import load_base
from manylora.server.serving import build, load_adapters

MARK = 260
"""The id of ``[TOOL_CALLS]``, after those of the tokenizer of tests/checkpoints.py."""

_TURNS = (
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
)
_END = "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HERMES = _TURNS + "<tool_call>\n{{ c.function | tojson }}\n</tool_call>" + _END
MISTRAL = _TURNS + "[TOOL_CALLS] [{{ c.function | tojson }}]" + _END

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 31}, "maxItems": 2},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": SCHEMA, "now": {"type": "object", "additionalProperties": False}}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]
NAMED = {"type": "function", "function": {"name": "get_weather"}}


def write_adapter(path: Path, template: str | None) -> Path:
    """A LoRA on q of both layers of the tiny llama, with a chat template if there is one."""
    random = np.random.default_rng(1)
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {
        stem.format(layer, side): random.normal(0, 0.2, shape).astype(np.float32)
        for layer in range(2)
        for side, shape in (("A", (4, 64)), ("B", (64, 4)))
    }
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors")
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture(scope="module")
def client(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    root = tmp_path_factory.mktemp("tools")
    checkpoint = Path(shutil.copytree(checkpoints["llama"], root / "llama"))
    changes = {"max_position_embeddings": 2048}
    (checkpoint / "config.json").write_text(json.dumps(json.loads((checkpoint / "config.json").read_text()) | changes))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(checkpoint))
    tokenizer.add_special_tokens({"extra_special_tokens": ["[TOOL_CALLS]"]})
    assert tokenizer.convert_tokens_to_ids("[TOOL_CALLS]") == MARK
    tokenizer.chat_template = HERMES
    tokenizer.save_pretrained(checkpoint)
    adapters = (("ada", None), ("mia", MISTRAL), ("tom", "{% for m in messages %}{{ m.content }}{% endfor %}"))
    settings = ServeConfig(
        model="llama",
        adapters=tuple(AdapterSpec(name, str(write_adapter(root / name, template))) for name, template in adapters),
        engine=EngineConfig(device="cpu", max_context=1536, max_batch_tokens=256, max_rows=8, max_device_adapters=3),
        api=ApiConfig(adapter_roots=(root,)),
    )
    base = load_base(str(checkpoint), cache_dir=root / "cache", progress=False)
    running = build(settings, base=base, progress=False)
    load_adapters(running, settings)
    running.engine.start()
    try:
        with TestClient(create_app(running.serving, settings.api), base_url="http://127.0.0.1:8000") as client:
            yield client
            running.engine.call(lambda: running.engine._scheduler.check_integrity()).result(30)
            assert running.engine.stats().kv_pages_used == 0
    finally:
        asyncio.run(running.close())


def fields_of(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Paris?"}]
    return {"model": "llama", "messages": messages, "tools": TOOLS, "seed": 1, "temperature": 1.3, **fields}


def ask(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/v1/chat/completions", json=fields_of(**fields))
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def calls_of(message: dict[str, Any]) -> list[str]:
    """The names, after a check of each call's arguments."""
    for call in message["tool_calls"]:
        jsonschema_rs.validate(SCHEMAS[call["function"]["name"]], json.loads(call["function"]["arguments"]))
    return [call["function"]["name"] for call in message["tool_calls"]]


@pytest.mark.parametrize("model", ["llama", "ada", "mia"])
def test_required_calls(client: TestClient, model: str) -> None:
    choices = ask(client, model=model, tool_choice="required", n=8)
    assert {choice["message"]["content"] for choice in choices} == {None}
    assert {choice["finish_reason"] for choice in choices} == {"tool_calls"}
    assert {name for choice in choices for name in calls_of(choice["message"])} == set(SCHEMAS)
    ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
    assert all((len(one) == 9) == (model == "mia") for one in ids)


@pytest.mark.parametrize("model", ["llama", "mia"])
def test_one_call(client: TestClient, model: str) -> None:
    for choice in ask(client, model=model, tool_choice="required", parallel_tool_calls=False, n=4):
        assert len(calls_of(choice["message"])) == 1
    for choice in ask(client, model=model, tool_choice=NAMED, n=4):
        assert calls_of(choice["message"]) == ["get_weather"]
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("model", ["llama", "mia"])
def test_a_stream_is_the_whole_in_pieces(client: TestClient, model: str) -> None:
    fields = {"model": model, "tool_choice": "required", "temperature": 0.8}
    [whole] = ask(client, **fields)
    response = client.post("/v1/chat/completions", json=fields_of(stream=True, **fields))
    calls: list[dict[str, str]] = []
    n_pieces = 0
    for line in response.text.split("\n\n")[:-2]:
        delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        assert not delta.get("content")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                calls.append(dict(call["function"]))
            else:
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
                n_pieces += 1
    assert calls == [call["function"] for call in whole["message"]["tool_calls"]]
    assert n_pieces > len(calls) or all(call["arguments"] == "{}" for call in calls)


def test_a_special_mark_begins_a_call_in_free_text(client: TestClient) -> None:
    """The model is free to talk, and biased to the mark: what follows that is kept to the format."""
    for choice in ask(client, model="mia", logit_bias={str(MARK): 100}, n=4):
        assert calls_of(choice["message"])
        assert choice["message"]["content"] is None
    # A model whose template has no such mark does not know it: it is a special token like any other, and not shown.
    [choice] = ask(client, logit_bias={str(MARK): 100}, max_tokens=4, tool_choice="none")
    assert choice["message"]["content"] == ""


def test_free_text_stays_text(client: TestClient) -> None:
    free = [tool | {"function": tool["function"] | {"strict": False}} for tool in TOOLS]  # type: ignore[operator]
    for tools in (TOOLS, free):
        [choice] = ask(client, tools=tools, max_tokens=24, logit_bias={"60": -100})  # without "<" there is no mark
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"]


def test_a_template_without_tools_is_told(client: TestClient) -> None:
    response = client.post("/v1/chat/completions", json=fields_of(model="tom"))
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tools"
