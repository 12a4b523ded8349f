"""llama.cpp by its Python package: one stream, no adapter, the demo base's own Q4_1 file. usage: llamacpp_q4.py GGUF

See bench/compare.py. It is given its tokens, and spends nothing on drawing them. The prompt is one batch, and so is
each token after the first.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import resident
from workload import Case


def start() -> Callable[[Case], resident.Measured]:
    from llama_cpp import Llama

    llm = Llama(sys.argv[1], n_ctx=1024, n_threads=os.cpu_count(), verbose=False)

    def measure(case: Case) -> resident.Measured:
        llm.reset()
        begin = time.perf_counter()
        llm.eval(case.prompt(0))
        first = time.perf_counter()
        for token in range(case.output_tokens - 1):
            llm.eval([5 + token])
        end = time.perf_counter()
        return {"seconds": end - begin, "decode_seconds": end - first}

    return measure


if __name__ == "__main__":
    resident.answer("llama.cpp q4_1", start)
