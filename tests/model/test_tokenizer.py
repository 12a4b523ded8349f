"""The tokenizer's calls, on a byte-level vocabulary and a sentencepiece one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from manylora.server.model.errors import ChatTemplateError
from manylora.server.model.tokenizer import Tokenizer

TEXTS = ["Hello a world", "naïve 日本語 🦙\n\ttabs", "", " leading and trailing "]


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Tokenizer:
    return Tokenizer.from_directory(checkpoints["llama"], eos_token_ids=(300,))


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """Bytes and a few pieces, with the normaliser and decoder of Llama 2's tokenizer.json."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    return Tokenizer(hf)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text


@pytest.mark.parametrize("text", ["a b a", "é a", "日本"])
def test_sentencepiece_bytes(text: str, sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == text
    assert b"".join(map(sentencepiece.token_bytes, ids)).decode() == " " + text  # the dummy prefix is a real token
    assert sentencepiece.eos_token_ids == (2,)


def test_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|im_end|>")
    assert ids[-1] == 258
    assert tokenizer.decode(ids) == "a"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>"
    assert tokenizer.token_bytes(258) == b"<|im_end|>"
    assert tokenizer.token_text(258) == "<|im_end|>"
    assert {257, 258, 259} <= tokenizer.special_ids
    assert tokenizer.eos_token_ids == (300, 258)  # the config's first, then the tokenizer's own


def test_spaces_between_special_tokens(tokenizer: Tokenizer, sentencepiece: Tokenizer) -> None:
    """The two kinds that models have put none there; one without a decoder joins all tokens with spaces."""
    assert not tokenizer.spaces_special_tokens
    assert not sentencepiece.spaces_special_tokens
    backend = Backend(models.WordLevel(vocab={"a": 0, "<s>": 1}, unk_token="a"))
    spaced = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    assert Tokenizer(spaced).spaces_special_tokens
    plain = Backend(models.WordLevel(vocab={"a": 0}, unk_token="a"))
    assert not Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=plain)).spaces_special_tokens


def test_ids_without_a_token_are_empty(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 260
    assert tokenizer.token_bytes(319) == b""
    assert tokenizer.token_text(tokenizer.encode("é")[0]) == "�"


def test_a_chat(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    expected = "<|im_start|>user\nHi<|im_end|>\n"

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=False)

    assert decode(tokenizer.apply_chat_template(messages)) == expected + "<|im_start|>assistant\n"
    assert decode(tokenizer.apply_chat_template(messages, add_generation_prompt=False)) == expected
    continued = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Hello"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert decode(continued) == expected + "<|im_start|>assistant\nHello"
    own = "{{ messages[0]['content'] }}{{ mood }}"
    assert decode(tokenizer.apply_chat_template(messages, chat_template=own, mood="!")) == "Hi!"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([{"role": "tool", "content": "x"}], {}, "no tools here"),
        ([{"role": "user"}], {}, "content"),
        ([{"role": "user", "content": ["x"]}], {}, "TypeError"),
        ([{"role": "user", "content": "x"}], {"chat_template": "{% if %}"}, "refused these messages"),
        ([{"role": "user", "content": "x"}], {"chat_template": "{{ ''.__class__.__mro__ }}"}, "unsafe"),
        ([{"role": "user", "content": "x"}], {"chat_template": "{{ messages.clear() }}"}, "refused"),
        ([{"role": "user", "content": "x"}], {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}, "failed"),
        ([{"role": "user", "content": "x"}], {"continue_final_message": True}, "exclude each other"),
    ],
)
def test_what_a_template_cannot_do_is_a_value_error(
    messages: list[dict[str, Any]], options: dict[str, Any], message: str, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ChatTemplateError, match=message) as caught:
        tokenizer.apply_chat_template(messages, **options)
    assert isinstance(caught.value, ValueError)


def test_a_model_without_a_template(sentencepiece: Tokenizer) -> None:
    assert not sentencepiece.has_chat_template
    with pytest.raises(ChatTemplateError, match="/v1/completions"):
        sentencepiece.apply_chat_template([{"role": "user", "content": "Hi"}])
