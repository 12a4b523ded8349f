"""Regular expressions out of adapter files, matched within bounds of time and memory. Torch-free.

An adapter's config may hold regular expressions, and the file may come from anyone who may upload. Python's ``re``
backtracks without end on some, and holds Python's lock meanwhile: every stream of the server would stop. The ``regex``
package matches with a time-out and without the lock. What such a pattern means is still what it means to ``re``, which
PEFT uses: a pattern that ``re`` does not take, or that the two might read differently, is refused.
"""

from __future__ import annotations

import re
import time
import warnings
from typing import Final

import regex

MAX_LENGTH: Final = 4096
_MAX_COST: Final = 20_000
"""Of ``_cost``: about what the compiled form of a plain pattern of a few times ``MAX_LENGTH`` costs."""
_SECONDS: Final = 1.0
"""For everything that is done with one adapter's patterns; a usual adapter takes a few milliseconds of it. A single
match ends after as much of the process's own time, which is what ``regex`` counts."""

_COMMENTS: Final = re.compile(r"\(\?(#|[a-zA-Z-]*x)")
_COUNTED: Final = re.compile(r"\{(\d*)(,?)(\d*)\}")


class PatternsTooSlow(Exception):
    """The patterns of one adapter need more time than any sensible ones would; the message names the last."""


class Patterns:
    """The regular expressions of one adapter; all that is done with them shares one budget of time."""

    def __init__(self, seconds: float = _SECONDS) -> None:
        self._left = seconds
        self._compiled: dict[str, regex.Pattern[str]] = {}

    def problem(self, pattern: str) -> str | None:
        """Why ``pattern`` cannot be used; None if it can."""
        try:
            self._compile(pattern)
        except PatternsTooSlow as error:
            return str(error)
        except ValueError as error:
            return str(error)
        return None

    def match(self, pattern: str, text: str, *, whole: bool = False) -> regex.Match[str] | None:
        """``re.match`` (or ``re.fullmatch``). Raises PatternsTooSlow, and ValueError for what ``problem`` names."""
        compiled = self._compile(pattern)
        start = self._begin(pattern)
        try:
            find = compiled.fullmatch if whole else compiled.match
            return find(text, timeout=self._left, concurrent=True)
        except TimeoutError as error:
            self._left = 0.0  # used up, also if the clock says less: regex counts the time of all threads
            raise PatternsTooSlow(_too_slow(pattern)) from error
        finally:
            self._left -= time.monotonic() - start

    def _begin(self, pattern: str) -> float:
        if self._left <= 0:
            raise PatternsTooSlow(_too_slow(pattern))
        return time.monotonic()

    def _compile(self, pattern: str) -> regex.Pattern[str]:
        if (known := self._compiled.get(pattern)) is not None:
            return known
        start = self._begin(pattern)
        try:
            self._compiled[pattern] = compiled = _compile(pattern)
            return compiled
        finally:
            self._left -= time.monotonic() - start


def _compile(pattern: str) -> regex.Pattern[str]:
    """Raises ValueError with what is wrong with the pattern."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"it has {len(pattern)} characters, more than the {MAX_LENGTH} that are read")
    if _cost(pattern) > _MAX_COST:
        raise ValueError("its repetitions are nested too deep: it would grow to an unreasonable size")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # nested sets, which re and regex read differently
            re.compile(pattern)
        # Version 0 is the behaviour of re.
        return regex.compile(pattern, flags=regex.V0)
    except (re.error, regex.error, OverflowError, FutureWarning) as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("its groups are nested too deep") from error


def _cost(pattern: str) -> float:
    """About the size that the pattern has when its repetitions are written out, which is what compiling it costs.

    ``regex`` writes out ``x+`` as ``x x*`` and ``x{9}`` as nine copies, so that nesting multiplies. Raises ValueError
    for what this or ``regex`` would read otherwise than ``re``: comments, and braces that do not count (text to
    ``re``, fuzzy matching to ``regex``).
    """
    if _COMMENTS.search(pattern):
        raise ValueError("comments and the flag x are not taken in it")
    stack: list[float] = [0.0]
    last = 0.0  # what the last atom costs, for a repetition that follows it
    i = 0
    while i < len(pattern):
        char = pattern[i]
        factor = 0
        if char == "\\":
            i += 1
            atom = 1.0
        elif char == "[":
            i = _end_of_set(pattern, i)
            atom = 1.0
        elif char == "(":
            stack.append(0.0)
            last = 0.0
            i += 1
            continue
        elif char == ")" and len(stack) > 1:
            atom = stack.pop() + 1.0
        elif char in "*+?":
            factor = 2
        elif char == "{":
            counted = _COUNTED.match(pattern, i)
            if counted is None or not (counted[1] or counted[3]):
                raise ValueError("a brace in it is not a repetition such as {2} or {1,3}; write \\{ for the character")
            factor = int(max(counted[1], counted[3], key=lambda digits: int(digits or 0))[:9]) + 1
            i = counted.end() - 1
        else:
            atom = 1.0
        if factor:
            stack[-1] += last * (factor - 1)
            last *= factor
        else:
            stack[-1] += atom
            last = atom
        i += 1
    return sum(stack)


def _end_of_set(pattern: str, start: int) -> int:
    """The index of the ``]`` that ends the set that begins at ``start``, or of the pattern's last character."""
    i = start + 1
    if pattern.startswith("^", i):
        i += 1
    if pattern.startswith("]", i):  # in the first place it is a member
        i += 1
    while i < len(pattern) and pattern[i] != "]":
        if pattern[i] == "[":
            raise ValueError("a bracket in a set of characters must be written \\[")  # a class or set to regex
        i += 2 if pattern[i] == "\\" else 1
    return min(i, len(pattern) - 1)


def _too_slow(pattern: str) -> str:
    shown = pattern if len(pattern) <= 60 else f"{pattern[:57]}..."
    return f"matching the regular expression {shown!a} takes too long"
