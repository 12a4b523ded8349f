"""The command line: options shared by run.py and by the locustfile, and what they mean together."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from loadgen.arrivals import Arrival, Shape, Spacing
from loadgen.errors import LoadTestError, ProfileError
from loadgen.profiles import PROFILES, Lengths, Loop, Popularity, PopularityKind, Profile, SwapAction, Swaps
from loadgen.settings import Settings, Targets
from loadgen.thresholds import DEFAULTS, WITH_SWAPS, Threshold

DEFAULT_PROFILE = "zipf"
_DAY_S = 86_400.0
T = TypeVar("T", Popularity, Arrival, Profile)


def describe_profiles() -> str:
    """A line for each profile."""
    return "profiles:\n" + "\n".join(f"  {name:10} {profile.about}" for name, profile in PROFILES.items())


def add_options(parser: Any, *, has_profile: bool = False) -> None:
    """``parser`` is argparse's, or locust's, whose own options (--users, --host, ...) these do not clash with, but for
    ``has_profile``: locust has a --profile too, a word that it makes no use of itself."""
    what = parser.add_argument_group("load: what is asked")
    if not has_profile:
        what.add_argument(
            "--profile",
            metavar="NAME",
            help=f"what the options below start from: {', '.join(PROFILES)} (default {DEFAULT_PROFILE})",
        )
    what.add_argument("--popularity", choices=get_args(PopularityKind)[:-1], help="how often each adapter is asked")
    what.add_argument(
        "--zipf-exponent",
        type=float,
        metavar="S",
        help="the k-th adapter is asked 1/k^S as often as the first (default 1)",
    )
    what.add_argument(
        "--hot-share", type=float, metavar="SHARE", help="of the first adapter, with skewed (default 0.8)"
    )
    what.add_argument("--base-share", type=float, metavar="SHARE", help="of requests to the base itself (default 0)")
    what.add_argument("--mix", metavar="NAME=W,...", help="shares of models, by weight; instead of --popularity")
    what.add_argument(
        "--adapters", metavar="N or NAME,...", help="the first N that the server lists, or these (default: all)"
    )
    what.add_argument("--base", metavar="NAME", help="the base's name (default: the listed model without a parent)")
    what.add_argument(
        "--chat-share", type=float, metavar="SHARE", help="of chats; the others are completions (default 0.5)"
    )
    what.add_argument(
        "--prompt-tokens", metavar="LENGTHS", help="64, 32-128 or lognormal:MEDIAN:SIGMA:LOW-HIGH (default 32-96)"
    )
    what.add_argument("--output-tokens", metavar="LENGTHS", help="the same, of answers (default 16-48)")
    what.add_argument(
        "--prefix-tokens",
        type=int,
        metavar="N",
        help="of each prompt that all prompts for a model begin with (default 0)",
    )
    what.add_argument("--seed", type=int, metavar="N", help="the same seed asks the same (default 0)")

    when = parser.add_argument_group("load: when, and for how long")
    when.add_argument(
        "--loop",
        choices=get_args(Loop),
        help="open: requests come when they come; closed: a client asks again when it is answered",
    )
    when.add_argument("--rate", type=float, metavar="R", help="open loop: requests a second (default 2)")
    when.add_argument("--clients", type=int, metavar="N", help="closed loop: clients (default 8); means --loop closed")
    when.add_argument(
        "--arrival",
        choices=get_args(Shape),
        help="steady; burst: 4 times as much in 2 s of every 10; ramp: from a tenth to all",
    )
    when.add_argument("--spacing", choices=get_args(Spacing), help="open loop: at random or evenly (default poisson)")
    when.add_argument("--burst", metavar="FACTOR:SECONDS:EVERY", help="other bursts than 4:2:10; means --arrival burst")
    when.add_argument("--ramp-from", type=float, metavar="SHARE", help="where a ramp begins (default 0.1)")
    when.add_argument(
        "--seconds", type=float, metavar="S", help="requests are sent for so long (default 30; a trace: to its end)"
    )
    when.add_argument("--max-requests", type=int, metavar="N", help="and are at most so many (default 10000)")
    when.add_argument(
        "--warmup", type=float, default=0.0, metavar="S", help="leave the first seconds out of the figures (default 0)"
    )
    when.add_argument(
        "--grace",
        type=float,
        default=60.0,
        metavar="S",
        help="after the last request, what still runs has so long to end (default 60)",
    )
    when.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of one request (default 300)")
    when.add_argument(
        "--max-open",
        type=int,
        default=512,
        metavar="N",
        help="open loop: requests open at once; more wait, and the report says so (default 512)",
    )

    trace = parser.add_argument_group("load: traces")
    trace.add_argument(
        "--trace", type=Path, metavar="FILE", help="replay these JSON lines instead of a profile's requests"
    )

    swaps = parser.add_argument_group("load: swaps, by the admin routes while traffic goes on")
    swaps.add_argument(
        "--swap-every", type=float, metavar="S", help="load, replace or unload an adapter every S seconds"
    )
    swaps.add_argument("--swap-actions", metavar="A,...", help="in turn (default load,replace,unload)")
    swaps.add_argument(
        "--swap-upload",
        type=Path,
        metavar="DIR",
        help="an adapter on this machine, uploaded as another version each time "
        "(default: the server's own adapters, from where it got them; a fresh demo server: a demo adapter)",
    )

    access = parser.add_argument_group("load: access")
    access.add_argument("--bearer", default="", metavar="KEY", help="API key (default $MANYLORA_API_KEY)")
    access.add_argument("--admin-bearer", default="", metavar="KEY", help="for swaps (default $MANYLORA_ADMIN_KEY)")
    access.add_argument("--unlisted-models", action="store_true", help="ask models that the server does not list, too")

    results = parser.add_argument_group("load: results")
    results.add_argument(
        "--out",
        type=Path,
        default=Path("build/loadtest"),
        metavar="DIR",
        help="for report.html, summary.json, requests.jsonl and trace.jsonl (default %(default)s)",
    )
    results.add_argument(
        "--target-ttft-ms",
        type=float,
        default=Targets.ttft_ms,
        metavar="MS",
        help="goodput: first token within (default %(default)g)",
    )
    results.add_argument(
        "--target-itl-ms",
        type=float,
        default=Targets.itl_ms,
        metavar="MS",
        help="goodput: 95th percentile of an answer's gaps within (default %(default)g)",
    )
    results.add_argument(
        "--fail-if",
        action="append",
        metavar="CONDITION",
        help="exit with 1 if it holds, e.g. 'ttft_p95_ms>500', 'goodput_share<0.9', 'sql:itl_p99_ms>100'; "
        "may be repeated (default failures>0)",
    )


def settings_of(options: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """LoadTestError for options that make no sense."""
    profile = profile_of(options)
    thresholds = tuple(Threshold.parse(text) for text in options.fail_if or ())
    for name in ("warmup", "grace"):
        if not 0 <= getattr(options, name) <= _DAY_S:
            raise LoadTestError(f"--{name}: expected 0 to {_DAY_S:g} seconds")
    if options.trace is None and options.warmup >= profile.seconds:
        raise LoadTestError(f"--warmup: {options.warmup:g} s is all of the run's {profile.seconds:g} s")
    if not 0 < options.timeout <= _DAY_S:
        raise LoadTestError(f"--timeout: expected more than 0 seconds, got {options.timeout:g}")
    if not 1 <= options.max_open <= 100_000:
        raise LoadTestError(f"--max-open: expected 1 to 100000, got {options.max_open}")
    if not (options.target_ttft_ms > 0 and options.target_itl_ms > 0):
        raise LoadTestError("--target-ttft-ms, --target-itl-ms: expected more than 0")
    count, names = _adapters(options.adapters)
    return Settings(
        profile=profile,
        out=options.out,
        trace=options.trace,
        n_adapters=count,
        adapters=names,
        base=options.base,
        targets=Targets(options.target_ttft_ms, options.target_itl_ms),
        thresholds=thresholds or (DEFAULTS if profile.swaps is None else WITH_SWAPS),
        warmup_s=options.warmup,
        grace_s=options.grace,
        timeout_s=options.timeout,
        max_open=options.max_open,
        bearer=options.bearer or environ.get("MANYLORA_API_KEY", ""),
        admin_bearer=options.admin_bearer or environ.get("MANYLORA_ADMIN_KEY", ""),
        swap_upload=options.swap_upload,
        unlisted_models=options.unlisted_models,
    )


def profile_of(options: argparse.Namespace) -> Profile:
    """The named profile, changed by what else was given. ProfileError for what no profile can be."""
    name = options.profile or DEFAULT_PROFILE
    if name not in PROFILES:
        raise ProfileError(f"--profile: no {name!r}; there are {', '.join(PROFILES)}")
    profile = PROFILES[name]
    if options.mix is not None and options.popularity is not None:
        raise ProfileError("--mix: not together with --popularity")
    if options.clients is not None and options.loop == "open":
        raise ProfileError("--clients: an open loop has a --rate, no clients")
    loop = options.loop or ("closed" if options.clients is not None else profile.loop)
    if options.rate is not None and loop == "closed":
        raise ProfileError("--rate: a closed loop has --clients, no rate")
    popularity = _given(
        profile.popularity,
        kind=options.popularity if options.mix is None else "mix",
        zipf_exponent=options.zipf_exponent,
        hot_share=options.hot_share,
        base_share=options.base_share,
        weights=None if options.mix is None else tuple(parse_mix(options.mix).items()),
    )
    bursts = {} if options.burst is None else _burst(options.burst)
    if options.burst is not None and options.arrival not in (None, "burst"):
        raise ProfileError(f"--burst: not together with --arrival {options.arrival}")
    arrival = _given(
        profile.arrival,
        **{"shape": options.arrival, "spacing": options.spacing, "ramp_from": options.ramp_from, **bursts},
    )
    seconds = options.seconds
    if seconds is None and options.trace is not None:
        seconds = _DAY_S
    return _given(
        profile,
        popularity=popularity,
        arrival=arrival,
        loop=loop,
        rate=options.rate,
        clients=options.clients,
        chat_share=options.chat_share,
        prompt=_lengths("--prompt-tokens", options.prompt_tokens),
        output=_lengths("--output-tokens", options.output_tokens),
        prefix_tokens=options.prefix_tokens,
        seconds=seconds,
        max_requests=options.max_requests,
        seed=options.seed,
        swaps=_swaps(profile.swaps, options),
    )


def _given(of: T, **fields: Any) -> T:
    """``of`` with those fields changed that were given."""
    changed: T = replace(of, **{name: value for name, value in fields.items() if value is not None})
    return changed


def _swaps(swaps: Swaps | None, options: argparse.Namespace) -> Swaps | None:
    if options.swap_every is not None:
        swaps = Swaps(options.swap_every) if swaps is None else replace(swaps, every_s=options.swap_every)
    if swaps is None:
        for name in ("swap_actions", "swap_upload"):
            if getattr(options, name) is not None:
                raise ProfileError(f"--{name.replace('_', '-')}: without --swap-every nothing is swapped")
        return None
    if options.swap_actions is None:
        return swaps
    actions: tuple[SwapAction, ...] = tuple(options.swap_actions.split(","))
    return replace(swaps, actions=actions)


def _lengths(option: str, text: str | None) -> Lengths | None:
    try:
        return None if text is None else Lengths.parse(text)
    except ProfileError as error:
        raise ProfileError(f"{option}: {error}") from None


def _burst(text: str) -> dict[str, Any]:
    try:
        factor, length, every = (float(part) for part in text.split(":"))
    except ValueError:
        raise ProfileError(f"--burst: expected FACTOR:SECONDS:EVERY, such as 4:2:10, got {text!r}") from None
    return {"shape": "burst", "burst_factor": factor, "burst_s": length, "burst_every_s": every}


def parse_mix(text: str) -> dict[str, float]:
    """``a=2,b=1`` as weights. ProfileError for anything else."""
    mix: dict[str, float] = {}
    for part in text.split(","):
        name, separator, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = 0.0
        if not separator or not name or value <= 0 or name in mix:
            raise ProfileError(f"--mix: expected name=weight, each name once with a positive weight, got {part!r}")
        mix[name] = value
    return mix


def _adapters(text: str | None) -> tuple[int | None, tuple[str, ...]]:
    if text is None:
        return None, ()
    if not text.isdecimal():
        return None, tuple(filter(None, text.split(",")))
    if int(text) < 1:
        raise LoadTestError("--adapters: expected at least 1")
    return int(text), ()
