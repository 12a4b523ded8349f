from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from manylora.server.engine.detokenizer import (
    ByteFallbackVocabulary,
    ByteLevelVocabulary,
    Detokenizer,
    Vocabulary,
    WindowVocabulary,
    vocabulary_for,
)
from tests.fakes import FakeTokenizer

TEXTS = [
    "Hello, world!\n\n\tdef f(x):\n    return x ** 2  # two  spaces",
    "Crème brûlée, naïve façade; Ελληνικά, кириллица, עברית, العربية",
    "日本語のテキスト。中文字符。한국어 문장입니다.",
    "🙂🙃👩‍👩‍👧‍👦🏳️‍🌈 flags: 🇯🇵🇧🇷 skin: 👍🏽",
    "combining: e\u0301 a\u0308\u0304 n\u0303 \u200d zero-width \ufeff bom",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓀁 \U0010ffff \ufffd",
]


def pieces(vocabulary: Vocabulary, token_ids: list[int], *, skip_special_tokens: bool = False) -> list[str]:
    stream = vocabulary.stream(skip_special_tokens=skip_special_tokens)
    return [*(stream.feed(token) for token in token_ids), stream.flush()]


# --- byte-level BPE, with the real tokenizer --------------------------------------------------------------------------


def decode(tokenizer: Any, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_encoded_text_comes_back(smollm2_tokenizer: Any, text: str) -> None:
    vocabulary = vocabulary_for(smollm2_tokenizer)
    assert isinstance(vocabulary, ByteLevelVocabulary)
    token_ids = smollm2_tokenizer.encode(text)
    out = pieces(vocabulary, token_ids)
    assert "".join(out) == text
    assert all("\ufffd" not in piece for piece in out) or "\ufffd" in text, "text ended inside a character"


@pytest.mark.parametrize("skip_special_tokens", [False, True])
def test_random_tokens_give_what_the_tokenizer_decodes(smollm2_tokenizer: Any, skip_special_tokens: bool) -> None:
    """Most random sequences are not UTF-8, so this is about what is replaced as well."""
    fast = vocabulary_for(smollm2_tokenizer)
    window = WindowVocabulary(lambda ids, skip: decode(smollm2_tokenizer, list(ids), skip_special_tokens=skip))
    rng = random.Random(0)
    # Tokens that are no whole characters, which uniform sampling would hardly ever put side by side.
    alone = smollm2_tokenizer.backend_tokenizer.decode_batch([[i] for i in range(len(smollm2_tokenizer))])
    broken = [i for i, text in enumerate(alone) if "\ufffd" in text]
    assert len(broken) > 100
    for trial in range(300):
        token_ids = [
            rng.choice(broken) if rng.random() < 0.5 else rng.randrange(len(smollm2_tokenizer))
            for _ in range(rng.randint(1, 30))
        ] + rng.choices(range(17), k=rng.randint(0, 3))
        rng.shuffle(token_ids)
        expected = decode(smollm2_tokenizer, token_ids, skip_special_tokens=skip_special_tokens)
        assert "".join(pieces(fast, token_ids, skip_special_tokens=skip_special_tokens)) == expected
        if trial < 30:
            assert "".join(pieces(window, token_ids, skip_special_tokens=skip_special_tokens)) == expected


def test_ids_that_do_not_exist_have_no_text(smollm2_tokenizer: Any) -> None:
    assert pieces(vocabulary_for(smollm2_tokenizer), [-1, 10**9]) == ["", "", ""]


def test_an_incomplete_character_is_held_back_and_replaced_at_the_end(smollm2_tokenizer: Any) -> None:
    token_ids = smollm2_tokenizer.encode("𓀀")
    assert len(token_ids) >= 3
    vocabulary = vocabulary_for(smollm2_tokenizer)
    assert pieces(vocabulary, token_ids) == [""] * (len(token_ids) - 1) + ["𓀀", ""]
    assert pieces(vocabulary, token_ids[:-1]) == [""] * (len(token_ids) - 1) + ["\ufffd"]


# --- SentencePiece with byte fallback ---------------------------------------------------------------------------------

WORDS = ["<unk>", "</s>", "▁Hello", "▁world", "!", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]


class _SentencePiece:
    """As much of a transformers tokenizer as ``vocabulary_for`` asks for, over a real ``tokenizers`` backend."""

    def __init__(self, *, strips: bool) -> None:
        bpe = models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[], byte_fallback=True)
        self.backend_tokenizer = Tokenizer(bpe)
        self.backend_tokenizer.add_special_tokens(["</s>"])
        parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        parts += [decoders.Strip(" ", 1, 0)] if strips else []
        self.backend_tokenizer.decoder = decoders.Sequence(parts)


@pytest.mark.parametrize("strips", [False, True])
@given(st.lists(st.integers(0, len(WORDS) - 1) | st.sampled_from([2, 3, 6, *"🙂é".encode()]), max_size=20))
@settings(max_examples=200, deadline=None)
def test_byte_fallback_gives_what_the_tokenizer_decodes(strips: bool, token_ids: list[int]) -> None:
    tokenizer = _SentencePiece(strips=strips)
    vocabulary = vocabulary_for(tokenizer)
    assert isinstance(vocabulary, ByteFallbackVocabulary)
    for skip in (False, True):
        expected = tokenizer.backend_tokenizer.decode(token_ids, skip_special_tokens=skip)
        text = "".join(pieces(vocabulary, token_ids, skip_special_tokens=skip))
        # A completion continues its prompt, so its leading space is kept.
        assert (text.removeprefix(" ") if strips else text) == expected


def test_a_decoder_that_is_not_understood_is_asked_instead() -> None:
    tokenizer = _SentencePiece(strips=False)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    assert isinstance(vocabulary_for(tokenizer), WindowVocabulary)


# --- special tokens that are shown ------------------------------------------------------------------------------------


def shown(vocabulary: Vocabulary, token_ids: list[int], *ids: int, skip: bool = True) -> str:
    stream = vocabulary.stream(skip_special_tokens=skip, shown=frozenset(ids))
    return "".join([*(stream.feed(token) for token in token_ids), stream.flush()])


def test_some_special_tokens_can_be_shown(smollm2_tokenizer: Any) -> None:
    """The marks of tool calls are, while all others are skipped."""
    start, end = smollm2_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    token_ids = [start, *smollm2_tokenizer.encode("é 🙂"), end]
    fast = vocabulary_for(smollm2_tokenizer)
    assert isinstance(fast, ByteLevelVocabulary)
    window = WindowVocabulary(
        lambda ids, skip: decode(smollm2_tokenizer, list(ids), skip_special_tokens=skip), fast.special_ids
    )
    for vocabulary in (fast, window):
        assert shown(vocabulary, token_ids) == "é 🙂"
        assert shown(vocabulary, token_ids, start) == "<|im_start|>é 🙂"
        assert shown(vocabulary, token_ids, start, end) == "<|im_start|>é 🙂<|im_end|>"
        assert shown(vocabulary, token_ids, start, skip=False) == "<|im_start|>é 🙂<|im_end|>"


def test_some_special_tokens_of_byte_fallback_can_be_shown() -> None:
    tokenizer = _SentencePiece(strips=False)
    [end] = tokenizer.backend_tokenizer.encode("</s>").ids
    vocabulary = vocabulary_for(tokenizer)
    assert isinstance(vocabulary, ByteFallbackVocabulary)
    assert shown(vocabulary, [end, end]) == ""
    assert shown(vocabulary, [end, end], end) == "</s></s>"


# --- stop strings -----------------------------------------------------------------------------------------------------


def run(text: str, *stop: str, include_stop: bool = False) -> tuple[list[str], str | None]:
    """One token per character, until a stop string was found; the deltas, with the flush at the end."""
    detokenizer = Detokenizer(FakeTokenizer().stream(skip_special_tokens=False), stop, include_stop=include_stop)
    out = []
    for character in text:
        out.append(detokenizer.feed(ord(character)))
        if detokenizer.stop is not None:
            break
    return [*out, detokenizer.finish()], detokenizer.stop


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert run("abENcENDx", "END") == (["a", "b", "", "", "ENc", "", "", "", ""], "END")


def test_what_was_held_back_comes_at_the_end() -> None:
    assert run("abEN", "END") == (["a", "b", "", "", "EN"], None)


def test_include_stop() -> None:
    assert "".join(run("abENDx", "END", include_stop=True)[0]) == "abEND"


def test_a_stop_string_that_overlaps_itself() -> None:
    assert run("aaab", "aab") == (["", "", "a", "", ""], "aab")


class _OneToken:
    """A stream whose one token is a whole text, as tokens of several characters are."""

    def __init__(self, text: str) -> None:
        self.text = text

    def feed(self, token_id: int) -> str:
        return self.text

    def flush(self) -> str:
        return ""


@pytest.mark.parametrize(
    ("stops", "text", "found"), [(("c", "b"), "a", "b"), (("bc", "b"), "a", "bc"), (("b", "bc"), "a", "b")]
)
def test_the_stop_string_that_begins_first_wins_then_the_one_listed_first(
    stops: tuple[str, ...], text: str, found: str
) -> None:
    detokenizer = Detokenizer(_OneToken("abcd"), stops)
    assert (detokenizer.feed(0), detokenizer.stop) == (text, found)


def test_a_stop_string_in_the_last_held_back_text_is_found() -> None:
    """A run of byte tokens is only told at the end; a stop string in it must be cut off there."""
    vocabulary = vocabulary_for(_SentencePiece(strips=False))
    detokenizer = Detokenizer(vocabulary.stream(skip_special_tokens=False), ("🙂",))
    first_byte = WORDS.index("<0x00>")
    assert [detokenizer.feed(first_byte + byte) for byte in "x🙂".encode()] == [""] * 5
    assert (detokenizer.finish(), detokenizer.stop) == ("x", "🙂")


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_cut_where_looking_at_the_whole_text_would(text: str, stops: list[str]) -> None:
    out, found = run(text, *stops)
    # The first time that some stop string is complete, the earliest beginning counts.
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(stop) for stop in stops)]
    if not ends:
        assert ("".join(out), found) == (text, None)
        return
    complete = [stop for stop in stops if text[: ends[0]].endswith(stop)]
    longest = max(complete, key=len)
    assert ("".join(out), found) == (text[: ends[0] - len(longest)], longest)


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_include_stop_only_adds_the_stop_string(text: str, stops: list[str]) -> None:
    without, found = run(text, *stops)
    with_stop, also_found = run(text, *stops, include_stop=True)
    assert found == also_found
    assert "".join(with_stop) == "".join(without) + (found or "")


def test_unchecked_text_is_not_part_of_a_stop_string() -> None:
    detokenizer = Detokenizer(FakeTokenizer().stream(skip_special_tokens=False), ("ab",))
    assert detokenizer.feed(ord("a"), check_stop=False) == "a"
    assert detokenizer.feed(ord("b")) == "b"
    assert detokenizer.stop is None
