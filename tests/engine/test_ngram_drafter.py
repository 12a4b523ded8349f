"""What is proposed, against a plain search; what it costs, and how it learns from what became of it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.server.engine.ngram_drafter import NgramDrafter


def searched(tokens: Sequence[int], shortest: int, longest: int, count: int) -> list[int]:
    """What follows the newest of the places where the most of the last tokens were there before; nothing unless at
    least ``shortest`` were. A text that runs into its own end goes on as it began."""
    n = len(tokens)
    best, found = shortest - 1, 0
    for place in range(n - 1, shortest - 1, -1):
        length = 0
        while length < min(longest, place) and tokens[place - 1 - length] == tokens[n - 1 - length]:
            length += 1
        if length > best:
            best, found = length, place
    drafts: list[int] = []
    for i in range(count if found else 0):
        drafts.append([*tokens, *drafts][found + i])
    return drafts


@given(st.lists(st.integers(0, 2), max_size=16), st.integers(0, 16), st.integers(1, 4), st.integers(0, 4))
def test_the_newest_of_the_longest_matches(tokens: list[int], cut: int, shortest: int, more: int) -> None:
    drafter = NgramDrafter(2, shortest=shortest, longest=shortest + more)
    found = drafter.propose(tokens[:cut], tokens[cut:], 2)
    assert list(found) == searched(tokens, shortest, shortest + more, 2)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 30))
def test_told_bit_by_bit_or_at_once(tokens: list[int], n_prompt: int) -> None:
    prompt, output = tokens[:n_prompt], tokens[n_prompt:]
    growing = NgramDrafter(2)
    for i in range(len(output) + 1):
        bit_by_bit = growing.propose(prompt, output[:i], 2)
    assert list(bit_by_bit) == list(NgramDrafter(2).propose(prompt, output, 2))
    assert growing.propose(prompt, output, 2) == bit_by_bit, "asking again is the same"


def test_never_more_than_asked_for() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3]
    drafter = NgramDrafter(4)
    for limit in range(3):
        assert drafter.propose(text, [], limit) == [4, 5][:limit]


def test_drafts_grow_while_all_is_accepted_and_fall_back() -> None:
    text = list(range(100)) * 2
    drafter = NgramDrafter(8)
    lengths = []
    for _ in range(4):
        draft = drafter.propose(text, [0, 1], 99)
        lengths.append(len(draft))
        drafter.judge(len(draft), len(draft))
    assert lengths == [2, 4, 8, 8]
    drafter.judge(8, 3)
    assert len(drafter.propose(text, [0, 1], 99)) == 4
    drafter.judge(4, 0)
    assert len(drafter.propose(text, [0, 1, 2], 99)) == 1


def test_wrong_guesses_ask_for_longer_matches_and_wait() -> None:
    """A text in which pairs recur and lead nowhere: after some wrong guesses hardly any are made."""
    rng = random.Random(3)
    prompt = [rng.randrange(12) for _ in range(300)]
    drafter, output, tried = NgramDrafter(8, shortest=1), [], 0
    for _ in range(600):
        draft = drafter.propose(prompt, output, 99)
        token = rng.randrange(12)
        if draft:
            tried += 1
            accepted = int(draft[0] == token)
            drafter.judge(len(draft), accepted)
        output.append(token)
    assert 0 < tried < 90, tried


def test_the_pause_doubles_with_each_wrong_guess() -> None:
    """However long the match is: tokens until the next try."""
    text = list(range(50)) * 9
    drafter, output = NgramDrafter(4), []
    pauses = []
    for _ in range(7):
        drafter.propose(text, output, 9)
        drafter.judge(1, 0)
        waited = 0
        output.append(len(output) % 50)
        while not drafter.propose(text, output, 9):
            output.append(len(output) % 50)
            waited += 1
        pauses.append(waited)
    assert pauses == [0, 2, 6, 14, 30, 62, 62]
    drafter.judge(1, 1)
    assert drafter.propose(text, [*output, len(output) % 50], 9), "one right guess, and it goes on"


def test_each_wrong_guess_asks_for_one_more_token_that_matches() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    for misses, needed in ((0, 2), (1, 3), (3, 5), (6, 7)):
        for n_matching in range(2, 9):
            drafter = NgramDrafter(2, longest=7)
            for _ in range(misses):
                drafter.judge(1, 0)
            prompt = [*text, *range(100, 200), *text[8 - n_matching : 8]]  # long enough for any pause
            assert bool(drafter.propose(prompt, [], 2)) == (n_matching >= needed), (misses, n_matching)


def test_a_copy_after_free_text_is_found() -> None:
    """Having guessed wrong does not keep it from guessing once there is something to copy."""
    rng = random.Random(5)
    source = [rng.randrange(5000) for _ in range(400)]
    prompt, output = [*source, *(rng.randrange(40) for _ in range(200))], []
    drafter = NgramDrafter(8)
    truth = [*(rng.randrange(40) for _ in range(300)), *source[50:250]]
    steps = copying = 0
    while len(output) < len(truth):
        draft = drafter.propose(prompt, output, len(truth) - len(output) - 1)
        accepted = 0
        while accepted < len(draft) and draft[accepted] == truth[len(output) + accepted]:
            accepted += 1
        if draft:
            drafter.judge(len(draft), accepted)
        copying += len(output) >= 300
        steps += 1
        output += truth[len(output) : len(output) + accepted + 1]
    assert output == truth
    assert copying < 100, f"{copying} steps for the 200 tokens that are copied"


def test_a_long_prompt_is_taken_in_over_several_calls() -> None:
    """No step waits for all of it; until it is known, nothing is drafted."""
    text = [*range(5000), 7, 8]
    drafter = NgramDrafter(4)
    found = [drafter.propose(text, [], 4) for _ in range(4)]
    assert [list(one) for one in found] == [[], [], [9, 10], [9, 10]]


def test_tokens_drawn_while_the_prompt_is_taken_in_are_in_order() -> None:
    prompt, output = list(range(4000)), [70, 71, 72]
    drafter = NgramDrafter(2)
    drafter.propose(prompt, [], 2)
    assert list(drafter.propose(prompt, output, 2)) == [73, 74]
    output += [73, 74, 75, 3000, 3001]
    assert list(drafter.propose(prompt, output, 2)) == [3002, 3003]


def test_the_memory_of_a_text_is_bounded() -> None:
    drafter = NgramDrafter(4)
    text = list(range(10_000))
    for _ in range(6):
        drafter.propose(text, [], 4)
    n_bytes = sum(part.itemsize * len(part) for part in (drafter._tokens, drafter._newest, drafter._before))
    assert n_bytes <= 65536 + 8 * len(text) + 16


@pytest.mark.parametrize(("count", "shortest", "longest"), [(0, 1, 1), (1, 0, 1), (1, 3, 2)])
def test_what_makes_no_sense_is_refused(count: int, shortest: int, longest: int) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        NgramDrafter(count, shortest=shortest, longest=longest)
