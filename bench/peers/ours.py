"""This project, without HTTP, as bench/compare.py asks its systems.

usage: ours.py WORKLOAD [--cpu-kernels K] [--cpu-arithmetic A] [--lora-dtype T], as those of ``manylora serve``
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import resident
from engine import Ours
from workload import Case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--cpu-kernels", default="auto")
    parser.add_argument("--cpu-arithmetic", default="int16")
    parser.add_argument("--lora-dtype", default="auto")
    options = parser.parse_args()

    def start() -> Callable[[Case], resident.Measured]:
        from manylora.server.http_server import new_loop

        logging.basicConfig(level=logging.ERROR)
        ours = Ours(
            options.workload,
            cpu_kernels=options.cpu_kernels,
            cpu_arithmetic=options.cpu_arithmetic,
            lora_dtype=options.lora_dtype,
        )
        runner = asyncio.Runner(loop_factory=new_loop)
        ours.start()

        def measure(case: Case) -> resident.Measured:
            if case.rows > 1:
                return {"seconds": runner.run(ours.engine(case))}
            seconds, first = runner.run(ours.one_stream(case))
            return {"seconds": seconds, "decode_seconds": seconds - first}

        return measure

    name = "manylora" if options.cpu_kernels == "auto" else f"manylora on {options.cpu_kernels}"
    name += "" if options.cpu_arithmetic == "int16" else f" in {options.cpu_arithmetic}"
    resident.answer(name + (", bf16 adapters" if options.lora_dtype == "bfloat16" else ""), start)


if __name__ == "__main__":
    main()
