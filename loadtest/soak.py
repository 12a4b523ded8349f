"""Ask a fresh server for everything at once, at random and for long, and hold each answer against what it must be.

    python -P loadtest/soak.py                        # 20 minutes; about 2 more for the references
    python -P loadtest/soak.py --minutes 2 --seed 7
    python -P loadtest/soak.py --keep --note 'after the new scheduler'    # and a line in bench/results/soak.jsonl

It starts `manylora serve` on the demo base with little of everything: keys and values for about a thousand tokens, four
device slots, four adapters in host memory, and more adapters than that. First each question is asked of each version of
the weights alone, in each form that it will have (plain, composed, merged exact and compact): the references. Then, at
the same time and until the time is over:

- clients ask any question of any name, streamed or whole, with speculation, priorities, several choices, shared
  prefixes; one in four leaves, before the first token or in the stream
- adapters are loaded, replaced by other versions, unloaded, pinned, aliased, merged and unmerged
- wrong requests and broken adapters are sent, and must be refused with the status that docs/api.md gives them

An answer names its weights (system_fingerprint: versions, and `-exact` or `-compact` if merged weights computed it).
They must be weights that its names meant at some time while it ran, and its tokens and log-probabilities must be the
reference's, to the bit: the project's promise on the CPU. loadgen/soak/judge.py has the rules. What is sent follows
from --seed; what meets what does not.

What fails a soak: an answer by wrong weights, or with a wrong token; any 5xx (none is provoked); a connection that the
client did not end; a wrong request that is not refused as documented; memory, threads or files that grow; a server that
does not end with exit code 0 and a clean integrity check after SIGTERM; nothing checked; from 5 minutes on, anything of
the above that never happened.

Memory: RSS is sampled every 2 s. The slope is fitted by least squares to means of 20 s, after --warm-up (keys and
values are committed as they are first used), and without the samples during and 5 s after a merge, whose copy of the
weights is meant to cost memory. It fails if it is above --max-slope by more than its own 95 % noise.

Exit codes: 0 passed; 1 not; 2 wrong options; 3 no server. Results in --out: summary.json, failures.jsonl (with request
and answer), vitals.jsonl, server.log.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

# The tests' random and broken adapters are what is loaded here, too.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from loadgen.errors import TargetError
from loadgen.fresh_server import ROOT
from loadgen.soak.session import Soak, SoakSettings
from loadgen.soak.verdict import Limits, console_text, keep, summary, write

RESULTS = ROOT / "bench" / "results" / "soak.jsonl"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="soak.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--minutes", type=_positive, default=20.0, metavar="M", help="of soaking (default 20)")
    made.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed sends the same (default 0)")
    made.add_argument("--clients", type=int, default=5, metavar="N", help="that ask good questions (default 5)")
    made.add_argument(
        "--versions", type=int, default=3, metavar="N",
        help="contents of each name that changes, of ranks 4 to 16; each needs its references (default 3)",
    )  # fmt: skip
    made.add_argument(
        "--admin-pause", type=_positive, default=3.0, metavar="S",
        help="between two actions of each of the two admins, on average (default 3)",
    )  # fmt: skip
    made.add_argument(
        "--max-slope", type=float, default=64.0, metavar="MIB",
        help="of RSS, an hour (default 64: at the default pace some 700 versions of 0.9 to 3.7 MB are loaded an hour, "
        "so this is about one in twenty that is never freed)",
    )  # fmt: skip
    made.add_argument(
        "--warm-up", type=float, metavar="S", help="left out of the slope (default: a quarter of the time)"
    )
    made.add_argument("--out", type=Path, default=ROOT / "build" / "soak", metavar="DIR", help="(default build/soak)")
    made.add_argument("--keep", action="store_true", help="append the summary to bench/results/soak.jsonl")
    made.add_argument("--note", default="", help="kept with the result")
    made.add_argument("--server-flags", default="", metavar="FLAGS", help="more for the server, e.g. '--threads 1'")
    return made


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if options.clients < 1 or options.versions < 1:
        made.error("--clients and --versions: at least 1")
    settings = SoakSettings(
        minutes=options.minutes,
        seed=options.seed,
        out=options.out.resolve(),
        versions=options.versions,
        clients=options.clients,
        admin_pause_s=options.admin_pause,
        server_flags=tuple(shlex.split(options.server_flags)),
    )
    limits = Limits(options.max_slope, options.minutes * 15 if options.warm_up is None else options.warm_up)
    soak = Soak(settings)
    try:
        soak.run()
    except (TargetError, httpx.HTTPError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 3
    found = summary(soak, limits)
    write(soak, found, settings.out)
    if options.keep:
        keep(found, RESULTS, options.note)
    print(console_text(found, settings.out), flush=True)
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
