"""This project, without HTTP, as bench/compare.py asks its systems. usage: ours.py WORKLOAD [cpu kernels: auto]"""

from __future__ import annotations

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
    kernels = sys.argv[2] if len(sys.argv) > 2 else "auto"

    def start() -> Callable[[Case], resident.Measured]:
        from manylora.server.http_server import new_loop

        logging.basicConfig(level=logging.ERROR)
        ours = Ours(Path(sys.argv[1]), cpu_kernels=kernels)
        runner = asyncio.Runner(loop_factory=new_loop)
        ours.start()

        def measure(case: Case) -> resident.Measured:
            if case.rows > 1:
                return {"seconds": runner.run(ours.engine(case))}
            seconds, first = runner.run(ours.one_stream(case))
            return {"seconds": seconds, "decode_seconds": seconds - first}

        return measure

    resident.answer("manylora" if kernels == "auto" else f"manylora ({kernels})", start)


if __name__ == "__main__":
    main()
