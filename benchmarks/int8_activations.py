"""What int8 activations cost, and whether `--activations int8` is what llama.cpp computes.

    python benchmarks/int8_activations.py STUDENT-4BIT --original STUDENT --work /tmp/int8

The first table feeds the inputs of every linear layer of the model, on one text, to llama.cpp's own
functions. The second compares next-token distributions at the last token of paragraphs of this
repository's README: KL divergence, and whether the most likely token is the same. llama.cpp reads
a GGUF of the same codes and keeps keys and values in float32. "one bit" is the same computation
after a third of the norms' weights went up and a third down by about one float32 bit: two programs
that sum in different orders differ at least as much. The unquantized model shows what the 4-bit
weights cost.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from exports import README, Score, llama_cpp, log_softmax
from machine import describe

import xinslm
from xinslm.export.config import GgufConfig
from xinslm.model.files import load_model, open_model
from xinslm.model.int8_inputs import int8_product, quantize_inputs
from xinslm.model.rms_norm import RMSNorm
from xinslm.model.transformer import Transformer
from xinslm.ranges import Activations
from xinslm.tokenizer.load import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import ggml

ROWS = 32
"""Weights of each layer whose products are compared."""


def scorer(model: Transformer) -> Score:
    def score(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return log_softmax(model.logits(model.hidden(torch.tensor([ids])))[0, -1].numpy())

    return score


def pytorch(path: Path, activations: Activations = "float", one_bit: bool = False) -> Score:
    model = load_model(path, activations=activations)
    generator = torch.Generator().manual_seed(0)
    for norm in [m for m in model.modules() if isinstance(m, RMSNorm) and one_bit]:
        step = torch.randint(-1, 2, norm.weight.shape, generator=generator)
        norm.weight.data *= 1 + 2.0**-23 * step
    return scorer(model)


def compare_products(path: Path, ids: list[int]) -> None:
    """Print how the products of all layers differ from llama.cpp's functions on equal inputs."""
    source, model = open_model(path), load_model(path, activations="int8")
    head = "model.embed_tokens" if model.config.tie_word_embeddings else "lm_head"
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(
                lambda _, given, name=name: inputs.__setitem__(name, given[0][0, -8:])
            )
    with torch.no_grad():
        inputs[head] = model.hidden(torch.tensor([ids]))[0, -8:]
    print("| kind | layers | inputs | codes that differ | scales | products | largest difference |")
    print("|---|---|---|---|---|---|---|")
    totals: dict[str, list[float]] = {}
    for name, x in inputs.items():
        stored = source.stored(f"{name}.weight")
        blocks, weight = ggml.q8_0_rows(x.numpy()), stored.dequantize()[:ROWS]
        codes, scales = quantize_inputs(x)
        theirs = ggml.products(stored.ggml_rows()[:ROWS], stored.format, blocks)
        largest = x.abs().double() @ weight.abs().double().T
        difference = (int8_product(x, weight) - torch.from_numpy(theirs)).abs() / largest
        row = totals.setdefault(stored.format, [0, 0, 0, 0, 0, 0.0])
        row[0] += 1
        row[1] += x.numel()
        row[2] += int((ggml.codes_of(blocks) != codes.numpy()).sum())
        row[3] += int((ggml.scales_of(blocks) != scales.numpy()).sum())
        row[4] += theirs.size
        row[5] = max(row[5], float(difference.max()))
    for kind, row in totals.items():
        counts = " | ".join(f"{count:,}" for count in row[:5])
        print(f"| {kind} | {counts} | {row[5]:.1e} of the sum of magnitudes |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--original", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=24)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    print(f"{describe(('torch', 'gguf', 'xllamacpp'))}; {args.model.name}\n")
    tokenizer = load_tokenizer(args.model)
    parts = [part for part in README.read_text().split("\n\n") if len(part) > 100]
    prompts = [list(tokenizer.encode(part))[:200] for part in parts[: args.prompts]]
    compare_products(args.model, prompts[0])
    print()
    gguf = args.work / "model.gguf"
    xinslm.run(GgufConfig(args.model, gguf, force=True))
    openers = {
        "llama.cpp": lambda: llama_cpp(gguf),
        "float": lambda: pytorch(args.model),
        "int8": lambda: pytorch(args.model, "int8"),
        "int8, one bit": lambda: pytorch(args.model, "int8", True),
        "float, one bit": lambda: pytorch(args.model, "float", True),
    }
    pairs = [("float", "int8"), ("llama.cpp", "int8"), ("llama.cpp", "float")]
    pairs += [("int8", "int8, one bit"), ("float", "float, one bit")]
    if args.original is not None:
        openers["unquantized"] = lambda: pytorch(args.original)
        pairs += [("unquantized", "float"), ("unquantized", "int8")]
    found: dict[str, list[np.ndarray]] = {}
    for name, open_runtime in openers.items():
        score = open_runtime()
        began = time.process_time()
        found[name] = [score(ids)[: tokenizer.vocab_size] for ids in prompts]
        seconds = time.process_time() - began
        print(f"{name}: {seconds:.1f} s of CPU for {sum(map(len, prompts)):,} tokens", flush=True)
    print(
        "\n| p | q | KL(p, q), nats, mean | largest of a text | same token |\n|---|---|---|---|---|"
    )
    for first, second in pairs:
        both = list(zip(found[first], found[second], strict=True))
        kl = [float((np.exp(p) * (p - q)).sum()) for p, q in both]
        same = sum(p.argmax() == q.argmax() for p, q in both)
        print(
            f"| {first} | {second} | {np.mean(kl):.1e} | {max(kl):.1e} | {same} of {len(both)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
