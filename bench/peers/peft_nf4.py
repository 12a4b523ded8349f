"""transformers + PEFT over bitsandbytes' NF4, adapters mixed by ``adapter_names``. usage: peft_nf4.py WORKLOAD

See bench/compare.py. With one adapter it is the active one, which is PEFT's faster way.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import resident
from workload import N_ADAPTERS, Case

PAD_TOKEN = 2


def start() -> Callable[[Case], resident.Measured]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = Path(sys.argv[1])
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.bfloat16, quantization_config=nf4, device_map="cpu"
    ).eval()
    model = PeftModel.from_pretrained(base, folder / "adapters" / "a0", adapter_name="a0").eval()
    for number in range(1, N_ADAPTERS):
        model.load_adapter(folder / "adapters" / f"a{number}", adapter_name=f"a{number}")

    def measure(case: Case) -> resident.Measured:
        ids = torch.tensor([case.prompt(row) for row in range(case.rows)])
        arguments: dict[str, Any] = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": PAD_TOKEN,
            "min_new_tokens": case.output_tokens, "max_new_tokens": case.output_tokens,
        }  # fmt: skip
        base_only: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if case.adapters == 0:
            base_only = model.disable_adapter()
        elif case.adapters == 1:
            model.set_adapter("a0")
        else:
            arguments["adapter_names"] = [case.adapter(row) for row in range(case.rows)]
        with torch.inference_mode(), base_only:
            begin = time.perf_counter()
            outputs = model.generate(**arguments)
            seconds = time.perf_counter() - begin
        if outputs.shape != (case.rows, case.prompt_tokens + case.output_tokens):
            raise RuntimeError(f"a request ended early: {tuple(outputs.shape)}")
        return {"seconds": seconds}

    return measure


if __name__ == "__main__":
    resident.answer("peft nf4", start)
