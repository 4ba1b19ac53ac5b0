"""Batched generation against transformers' `generate`: the same weights, prompts and lengths.

    python benchmarks/generation.py MODEL_FOLDER --new-tokens 128

`--native` adds the native engine with weights rounded to 8 bits, what `synthesize` and `onpolicy`
write with. Each side writes one batch of each size in one process, in turns; every text has all new tokens
(no end token), so the work is equal. Greedy texts are compared before anything is timed. The
seconds are the process's own processor time, so that a busy machine disturbs less, with wall time
beside it. The last columns are the ratios to transformers one prompt at a time and at its best.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from machine import describe

from xinslm.inference.native_batch import NativeBatch, with_8_bit_weights
from xinslm.inference.raw_weights import open_raw
from xinslm.model.decode import RowDecoder
from xinslm.model.files import load_model
from xinslm.model.transformer import Transformer
from xinslm.sampling import Sampling
from xinslm.teachers.generate import Decoder, Limits, generate_batch
from xinslm.tokenizer.load import load_tokenizer
from xinslm.tokenizer.start import text_ids

SUBJECTS = "the sea|a good teacher|bread|small computers|the moon|winter|music|honest people"
BEGINNINGS = "The most important thing about {} is|Once there was a story of {}, and|Why {}"


def make_prompts(tokenizer: object, count: int, length: int) -> list[np.ndarray]:
    """`count` different prompts of `length` tokens."""
    starts = [b.format(s) for s in SUBJECTS.split("|") for b in BEGINNINGS.split("|")]
    prompts = []
    for number in range(count):
        text = ". ".join(starts[(number * 7 + k * 5) % len(starts)] for k in range(length))
        ids = text_ids(tokenizer, f"{number}. {text}")
        prompts.append(np.array(ids[:length]))
    return prompts


def ours(
    model: Transformer | NativeBatch, prompts: list[np.ndarray], new: int, temperature: float
) -> list[list[int]]:
    """Texts of our loop in one batch."""

    def open_decoder(rows: int, length: int) -> Decoder:
        if isinstance(model, NativeBatch):
            return model.open_decoder(rows, length)
        return RowDecoder(model, rows, length)

    written = generate_batch(
        open_decoder,
        prompts,
        range(len(prompts)),
        Sampling(temperature=temperature, top_k=0, top_p=1.0, min_p=0.0, seed=0),
        Limits(new, len(prompts[0]) + new, frozenset(), len(prompts)),
    )
    return [text.tokens.tolist() for text in written.texts]


@torch.inference_mode()
def theirs(
    model: object, prompts: list[np.ndarray], new: int, temperature: float
) -> list[list[int]]:
    """Texts of `generate` in one batch; prompts have one length, so there are no pads."""
    ids = torch.from_numpy(np.stack(prompts))
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        pad_token_id=0,
        **(sampled if temperature else {"do_sample": False}),
    )
    return out[:, ids.shape[1] :].tolist()


def timed(run: Callable[[], list[list[int]]]) -> tuple[float, float]:
    """Processor and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def measure(args: argparse.Namespace, dtype: str) -> None:
    """Check the greedy texts, then time both sides and print a table."""
    model = load_model(args.model, getattr(torch, dtype)).eval().requires_grad_(False)
    peer = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=getattr(torch, dtype)
    ).eval()
    peer.generation_config.eos_token_id = None
    prompts = make_prompts(load_tokenizer(args.model), max(args.sizes), args.prompt_tokens)
    some = prompts[:4]
    pairs = zip(ours(model, some, 32, 0), theirs(peer, some, 32, 0), strict=True)
    same = [next((i for i in range(32) if a[i] != b[i]), 32) for a, b in pairs]
    print(f"\n{dtype}: greedy texts of 4 prompts agree for {same} of 32 tokens", flush=True)
    if dtype == "float32" and min(same) < 32:
        raise SystemExit("the sides do not do the same work")
    sides = {"xinslm": (ours, model), "transformers": (theirs, peer)}
    if args.native:
        batch = NativeBatch(with_8_bit_weights(open_raw(args.model)), model.config.vocab_size)
        sides["xinslm, native"] = (ours, batch)
        pairs = zip(ours(batch, some, 32, 0), theirs(peer, some, 32, 0), strict=True)
        same = [next((i for i in range(32) if a[i] != b[i]), 32) for a, b in pairs]
        print(f"native, 8 bits: {same} of 32", flush=True)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for turn in range(args.rounds):
        for size in args.sizes:
            for name in sorted(sides, reverse=turn % 2 == 1):
                write, net = sides[name]
                took = timed(lambda: write(net, prompts[:size], args.new_tokens, args.temperature))  # noqa: B023
                found.setdefault((name, size), []).append(took)
    speed = {
        key: [size * args.new_tokens / statistics.median(t) for t in zip(*took, strict=True)]
        for key, took in found.items()
        for size in [key[1]]
    }
    one = speed["transformers", min(args.sizes)][0]
    best = max(value[0] for (name, _), value in speed.items() if name == "transformers")
    print("| side | batch | tokens/processor-s | tokens/s | to one at a time | to its best |")
    print("|---|---|---|---|---|---|")
    for (name, size), (cpu, wall) in sorted(speed.items(), key=lambda item: item[0][::-1]):
        print(f"| {name} | {size} | {cpu:.0f} | {wall:.0f} | {cpu / one:.1f} | {cpu / best:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a LLaMA folder")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 64, 128])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--native", action="store_true", help="the native engine too")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    load = os.getloadavg()[0]
    print(f"{describe()}, {args.threads} threads, load {load:.1f} at the start")
    print(f"{args.prompt_tokens} + {args.new_tokens} tokens, temperature {args.temperature}")
    for dtype in args.dtypes:
        measure(args, dtype)


if __name__ == "__main__":
    main()
