"""Four streamed chats at once: the base and three adapters, one batch of one model. Standard library only.

    .venv/bin/python -P examples/four_at_once.py [--url http://127.0.0.1:8000] ["one prompt for all four"]

Without a prompt each model gets one that suits it. Every answer is printed as it stands when its stream ends, with the
time to its first token; the four overlap.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
import urllib.request

PROMPTS = {
    "smollm2": "What is the capital of Sweden?",
    "pirate": "What is the capital of Sweden?",
    "sql": "Which cities have more than 100 customers?",
    "json": "John Smith is 42 years old and works as a plumber in Chicago.",
}
printing = threading.Lock()


def stream(url: str, model: str, prompt: str) -> None:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 64,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    start, first, text = time.perf_counter(), 0.0, ""
    with urllib.request.urlopen(request, timeout=300) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:])["choices"]
            piece = choices[0]["delta"].get("content") if choices else None
            if piece:
                first = first or time.perf_counter() - start
                text += piece
    with printing:
        print(f"{model:8} ({prompt})\n    {text.strip()}\n    first token after {first * 1e3:.0f} ms\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="the same prompt for all four")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where `make demo` listens")
    options = parser.parse_args()
    try:
        urllib.request.urlopen(f"{options.url}/ready", timeout=10).close()
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: no server is ready at {options.url} ({error}); start one with `make demo`.\n")
    threads = [
        threading.Thread(target=stream, args=(options.url, model, options.prompt or prompt))
        for model, prompt in PROMPTS.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
