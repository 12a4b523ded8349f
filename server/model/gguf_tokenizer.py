"""The tokenizer inside a GGUF file, with the pre-tokenizer that its merges were learned with.

transformers builds the vocabulary, merges and special tokens. Which rule cuts text into words before the merges apply
is only a name in the file (``tokenizer.ggml.pre``); transformers 5.23 knows some of the names and takes GPT-2's rule
for the others, which gives other tokens without a word. Here the name decides, and an unknown one is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from manylora.server.model.errors import BadCheckpoint, UnsupportedModel

_LLAMA3_WORDS: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS: Final = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_WORDS: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The ``Split`` patterns in the tokenizer.json of Llama 3, Qwen2 and Mistral Nemo."""

_SPLITS: Final = {
    "llama-bpe": _LLAMA3_WORDS,
    "llama3": _LLAMA3_WORDS,
    "llama-v3": _LLAMA3_WORDS,
    "qwen2": _QWEN2_WORDS,
    "deepseek-r1-qwen": _QWEN2_WORDS,
    "tekken": _TEKKEN_WORDS,
}
_WHOLE_WORDS_FIRST: Final = ("llama-bpe", "llama3", "llama-v3", "tekken")
"""Vocabularies that look a word up whole before merging (``ignore_merges`` in tokenizer.json)."""
_NORMALISED: Final = ("qwen2", "deepseek-r1-qwen")
"""Vocabularies whose tokenizer.json has Unicode NFC as its normaliser."""
_KNOWN: Final = ("gpt-2", "smollm", *_SPLITS)


def load_gguf_tokenizer(path: Path, kind: str | None, pre: str | None) -> Any:
    """transformers' fast tokenizer of a GGUF file, whose metadata name its ``kind`` (``tokenizer.ggml.model``) and the
    pre-tokenizer ``pre`` (``tokenizer.ggml.pre``). Raises UnsupportedModel or BadCheckpoint.
    """
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(
            str(path), f"GGUF tokenizer `{kind}` (known: gpt2, llama); serve the safetensors checkpoint"
        )
    if kind == "gpt2" and pre not in _KNOWN:
        raise UnsupportedModel(
            str(path), f"GGUF pre-tokenizer `{pre}` (known: {', '.join(_KNOWN)}); serve the safetensors checkpoint"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, ImportError) as error:
        raise BadCheckpoint(str(path), f"its tokenizer cannot be read: {error}") from error
    if kind == "gpt2":
        _set_words(loaded.backend_tokenizer, str(pre))
    return loaded


def _set_words(backend: Any, pre: str) -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in _SPLITS)
    if pre in _SPLITS:
        first = pre_tokenizers.Split(Regex(_SPLITS[pre]), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    elif pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    else:
        backend.pre_tokenizer = byte_level
    if pre in _NORMALISED:
        backend.normalizer = normalizers.NFC()
    if pre in _WHOLE_WORDS_FIRST:
        backend.model.ignore_merges = True
