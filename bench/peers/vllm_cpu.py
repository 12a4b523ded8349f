"""vLLM on the CPU. usage: vllm_cpu.py WORKLOAD [--no-lora] [--dtype float32|bfloat16]   (see bench/compare.py)

Without --dtype it is the faster of the two: bfloat16 where the processor has AVX512-BF16, else float32. With
LoRA on, vLLM does not compile the model, so that its base is slower than with LoRA off: both are systems of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import resident
from workload import N_ADAPTERS, Case

# 2 GiB for keys and values, threads left to the system: what its documents advise for few cores.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# While others are measured this process is stopped, for longer than a step may take by default (300 s).
os.environ.setdefault("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", "86400")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", type=Path)
    parser.add_argument("--no-lora", action="store_true")
    has_bf16 = "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if has_bf16 else "float32")
    options = parser.parse_args()

    def start() -> Callable[[Case], resident.Measured]:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest

        lora = {"enable_lora": True, "max_loras": N_ADAPTERS, "max_cpu_loras": N_ADAPTERS, "max_lora_rank": 16}
        llm = LLM(
            str(options.workload / "model"), dtype=options.dtype, max_model_len=1024, max_num_seqs=32,
            enable_prefix_caching=False, **({} if options.no_lora else lora),
        )  # fmt: skip

        def request(name: str | None) -> LoRARequest | None:
            if name is None:
                return None
            return LoRARequest(name, int(name[1:]) + 1, str(options.workload / "adapters" / name))

        def measure(case: Case) -> resident.Measured:
            sampling = SamplingParams(temperature=0, max_tokens=case.output_tokens, ignore_eos=True)
            prompts = [{"prompt_token_ids": case.prompt(row)} for row in range(case.rows)]
            adapters = [request(case.adapter(row)) for row in range(case.rows)] if case.adapters else None
            begin = time.perf_counter()
            outputs = llm.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
            seconds = time.perf_counter() - begin
            if any(len(output.outputs[0].token_ids) != case.output_tokens for output in outputs):
                raise RuntimeError("a request ended early")
            return {"seconds": seconds}

        return measure

    resident.answer(f"vllm-cpu {options.dtype}{' (lora off)' if options.no_lora else ''}", start)


if __name__ == "__main__":
    main()
