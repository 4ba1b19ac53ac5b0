"""One quantized folder in every format, each read by its own runtime.

    python benchmarks/exports.py STUDENT-4BIT --work /tmp/exports

For each format: size, seconds of the export, weights that differ from the quantized folder's after
the format's definition has decoded them, and in llama.cpp, transformers and mlx-lm the KL divergence
from PyTorch on the same 4-bit weights at the last token of each paragraph of this repository's
README, and whether the most likely token is the same. Runtimes that are not installed are left out.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from machine import describe

import xinslm
from xinslm.export.config import GgufConfig, HfConfig, MlxConfig
from xinslm.model.files import load_model, open_model, read_tensors
from xinslm.tokenizer.load import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
README = Path(__file__).parent.parent / "README.md"
Score = Callable[[list[int]], np.ndarray]
"""From ids to the log-probabilities of the next token."""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def pytorch(path: Path) -> Score:
    model = load_model(path)

    def score(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return log_softmax(model.logits(model.hidden(torch.tensor([ids])))[0, -1].numpy())

    return score


def transformers(path: Path) -> Score:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)

    def score(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return log_softmax(model(torch.tensor([ids])).logits[0, -1].float().numpy())

    return score


def mlx_lm(path: Path) -> Score:
    import mlx.core as mx
    from mlx_lm.utils import load_model as load

    model, _ = load(path)

    def score(ids: list[int]) -> np.ndarray:
        return log_softmax(np.array(model(mx.array([ids]))[0, -1].astype(mx.float32)))

    return score


def llama_cpp(path: Path) -> Score:
    from llama_cpp import LlamaCpp

    llama = LlamaCpp(path, 1024).__enter__()
    return lambda ids: llama.next_logprobs(ids, load_tokenizer(path).vocab_size)


FORMATS: dict[str, tuple[Callable, str, Callable | None]] = {
    "GGUF": (lambda m, o: GgufConfig(m, o, force=True), "gguf", llama_cpp),
    "compressed-tensors": (lambda m, o: HfConfig(m, o, force=True), "", transformers),
    "compressed-tensors, bfloat16": (
        lambda m, o: HfConfig(m, o, dtype="bfloat16", force=True),
        "",
        transformers,
    ),
    "GPTQ": (lambda m, o: HfConfig(m, o, format="gptq", force=True), "", None),
    "MLX": (lambda m, o: MlxConfig(m, o, force=True), "", mlx_lm),
    "MLX, float16": (lambda m, o: MlxConfig(m, o, dtype="float16", force=True), "", mlx_lm),
}


def size(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def differing(model: Path, other: Path) -> tuple[int, int]:
    """Weights that differ, and of those the ones in matrices with codes."""
    source, count, coded = open_model(model), 0, 0
    found = dict(read_tensors(other))
    for name, weight in read_tensors(model):
        wrong = int((found[name].float() != weight).sum())
        count += wrong
        if source.stored(name).scales is not None and "embed" not in name:
            coded += wrong
    return count, coded


def compare(expected: list[np.ndarray], score: Score, prompts: list[list[int]]) -> str:
    theirs = [score(ids)[: len(p)] for ids, p in zip(prompts, expected, strict=True)]
    kl = [float((np.exp(p) * (p - q)).sum()) for p, q in zip(expected, theirs, strict=True)]
    same = np.mean([p.argmax() == q.argmax() for p, q in zip(expected, theirs, strict=True)])
    return f"{np.mean(kl):.1e} | {same:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{describe(('torch', 'transformers', 'gguf'))}; {args.model.name}\n")
    tokenizer = load_tokenizer(args.model)
    parts = [part for part in README.read_text().split("\n\n") if len(part) > 100]
    prompts = [list(tokenizer.encode(part))[:200] for part in parts[: args.prompts]]
    ours = pytorch(args.model)
    expected = [ours(ids) for ids in prompts]
    print("| format | MB | seconds | weights that differ | in codes | KL, nats | same token |")
    print("|---|---|---|---|---|---|---|")
    for name, (configure, end, open_runtime) in FORMATS.items():
        path = args.work / (name.replace(", ", "-").replace(" ", "") + (f".{end}" if end else ""))
        began = time.perf_counter()
        xinslm.run(configure(args.model, path))
        seconds = time.perf_counter() - began
        count, coded = differing(args.model, path)
        try:
            figures = compare(expected, open_runtime(path), prompts) if open_runtime else "- | -"
        except ImportError as error:
            figures = f"{error} | -"
        print(
            f"| {name} | {size(path) / 1e6:.1f} | {seconds:.1f} | {count:,} | {coded:,} | {figures} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
