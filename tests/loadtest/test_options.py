"""What the command line means, and what it refuses."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from loadgen.errors import LoadTestError
from loadgen.options import add_options, describe_profiles, settings_of
from loadgen.profiles import PROFILES, Swaps
from loadgen.settings import Settings


def settings(*arguments: str, environ: dict[str, str] | None = None) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return settings_of(parser.parse_args(arguments), environ or {})


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_alone_is_itself(name: str) -> None:
    made = settings("--profile", name)
    assert made.profile == PROFILES[name]
    assert [str(one) for one in made.thresholds] == ["failures>0"] + ["swap_failures>0"] * (name == "swaps")
    assert f"  {name} " in describe_profiles()


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        ("--popularity skewed --hot-share 0.5", "popularity.hot_share", 0.5),
        ("--popularity skewed --hot-share 0.5", "popularity.kind", "skewed"),
        ("--mix a=2,b:c=1", "popularity.weights", (("a", 2.0), ("b:c", 1.0))),
        ("--base-share 0", "popularity.base_share", 0),
        ("--clients 4", "loop", "closed"),
        ("--clients 4", "clients", 4),
        ("--rate 0.5", "rate", 0.5),
        ("--burst 8:1:5", "arrival.burst_every_s", 5),
        ("--burst 8:1:5", "arrival.shape", "burst"),
        ("--spacing fixed", "arrival.spacing", "fixed"),
        ("--chat-share 0", "chat_share", 0),
        ("--output-tokens 7", "output.high", 7),
        ("--swap-every 2 --swap-actions replace", "swaps", Swaps(2.0, ("replace",))),
        ("--trace x", "seconds", 86_400),
        ("--trace x --seconds 5", "seconds", 5),
        ("--seed 9", "seed", 9),
    ],
)
def test_options_change_the_profile(arguments: str, field: str, value: object) -> None:
    at: Any = settings(*arguments.split()).profile
    for name in field.split("."):
        at = getattr(at, name)
    assert at == value


def test_adapters_by_number_and_by_name() -> None:
    assert (settings("--adapters", "3").n_adapters, settings("--adapters", "3").adapters) == (3, ())
    assert (settings("--adapters", "a,b").n_adapters, settings("--adapters", "a,b").adapters) == (None, ("a", "b"))


def test_keys_come_from_the_environment_and_are_not_shown() -> None:
    made = settings("--bearer", "k1", environ={"MANYLORA_API_KEY": "k2", "MANYLORA_ADMIN_KEY": "k3"})
    assert (made.bearer, made.admin_bearer) == ("k1", "k3")
    assert "k1" not in repr(made)
    assert "k3" not in repr(made)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--profile zigzag", "--profile: no 'zigzag'"),
        ("--fail-if ttft>5", "no figure 'ttft'"),
        ("--mix a=1 --popularity zipf", "--mix"),
        ("--mix a", "--mix"),
        ("--mix a=1,a=2", "--mix"),
        ("--mix a=nan", "mix"),
        ("--clients 4 --loop open", "--clients"),
        ("--rate 4 --loop closed", "--rate"),
        ("--rate 4 --clients 2", "--rate"),
        ("--profile smoke --rate 4", "--rate"),
        ("--prompt-tokens many", "--prompt-tokens: lengths"),
        ("--burst 4:2", "--burst"),
        ("--burst 4:2:10 --arrival ramp", "--burst"),
        ("--swap-actions load", "--swap-every"),
        ("--swap-every 1 --swap-actions melt", "swap actions"),
        ("--warmup 30", "--warmup"),
        ("--grace -1", "--grace"),
        ("--timeout 0", "--timeout"),
        ("--max-open 0", "--max-open"),
        ("--adapters 0", "--adapters"),
        ("--target-itl-ms 0", "--target"),
        ("--seconds 1e9", "seconds"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: str, says: str) -> None:
    with pytest.raises(LoadTestError, match=says):
        settings(*arguments.split())


def test_results_go_where_they_are_told() -> None:
    assert settings("--out", "x").out == Path("x")
