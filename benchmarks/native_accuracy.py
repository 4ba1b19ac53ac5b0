r"""How far int8 activations and float16 keys take the logits from float32 of the same weights.

    python benchmarks/native_accuracy.py student.gguf --text README.md \
        --peer llama.cpp=LLAMA_VENV/bin/python

The PyTorch engine computes the same dequantized weights in float32. KL divergence in nats of a token,
share of positions with the same most likely token, and the relative distance of the logits; mean over
positions of several passages, and the median of the passages' ratios.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from machine import describe
from native_engine import Side

from xinslm.model.files import load_model
from xinslm.tokenizer.load import load_tokenizer

PASSAGE = 200


def normalized(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities, float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="NAME=PYTHON")
    parser.add_argument("--passages", type=int, default=8)
    options = parser.parse_args()
    print(describe(), flush=True)
    tokenizer, model = load_tokenizer(options.file), load_model(options.file)
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8"))
    name, _, python = options.peer.partition("=")
    sides = [
        Side("xinslm", [sys.executable], options.file, 2),
        Side(name, [python], options.file, 2),
    ]
    found: dict[str, list[tuple[float, float, float]]] = {side.name: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.passages):
            # without the start token: its rounding, the same in all passages, would be most of the result
            part = ids[number * PASSAGE : (number + 1) * PASSAGE]
            with torch.inference_mode():
                exact = model.logits(model.hidden(torch.tensor([part])))[0].numpy()
            wanted = normalized(exact[:, : tokenizer.vocab_size])
            for side in sides:
                file = f"{folder}/{side.name}.npy"
                side.ask(do="rows", ids=part, file=file)
                logits = np.load(file)[:, : tokenizer.vocab_size]
                got = normalized(logits)
                kl = float((np.exp(wanted) * (wanted - got)).sum(1).mean())
                same = float((wanted.argmax(1) == got.argmax(1)).mean())
                away = np.linalg.norm(got - wanted, axis=1) / np.linalg.norm(wanted, axis=1)
                found[side.name].append((kl, same, float(away.mean())))
    print("| engine | KL to float32, nats | same most likely token | relative distance |")
    print("|---|---|---|---|")
    for side in sides:
        kl, same, away = (statistics.mean(column) for column in zip(*found[side.name], strict=True))
        print(f"| {side.name} | {kl:.5f} | {same:.1%} | {away:.5f} |")
    ratios = sorted(a[0] / b[0] for a, b in zip(found["xinslm"], found[name], strict=True))
    print(
        f"KL of xinslm / KL of {name}, passage by passage: median {statistics.median(ratios):.2f} "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
    )


if __name__ == "__main__":
    main()
