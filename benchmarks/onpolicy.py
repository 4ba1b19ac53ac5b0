"""`onpolicy` against TRL's GKDTrainer with lmbda 1: tokens the student wrote, had scored and learnt
from, a second.

    python benchmarks/onpolicy.py --data ../shared/data --work /tmp/core --peer-python
    trl-venv/bin/python

A 46M teacher and a 14M student, vocabulary 32,000, prompts of 128 tokens and 128 new ones. Our time
is the whole command: loading both models, writing, scoring, learning, all files and checkpoints.
The peer's is its steps behind the first, at GKDConfig's defaults (generation without a key-value
cache) and with gradient_checkpointing=False (with one). Both students' greedy texts are compared
before anything is timed.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from against_gkd import STUDENT, TEACHER, equal_blocks, make_model, make_tokenizer
from machine import describe
from sides import figures_of, in_turn, keep, median, ratios, xinslm

from xinslm.data.dataset import open_dataset
from xinslm.losses.config import LossConfig
from xinslm.model.decode import RowDecoder
from xinslm.model.files import load_model
from xinslm.rollouts import onpolicy
from xinslm.rollouts.onpolicy_config import OnPolicyConfig
from xinslm.rollouts.student_texts import find_prompts
from xinslm.sampling import Sampling
from xinslm.teachers.generate import Limits, generate_batch

PROMPT = 128


def our_side(args: argparse.Namespace) -> None:
    """One round of the real command; prints one JSON line."""
    torch.set_num_threads(args.threads)
    marks: dict[str, float] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as out:
        config = OnPolicyConfig(
            student=args.work / "student",
            teacher=str(args.work / "teacher-0"),
            prompts=args.work / "prompts",
            output_dir=Path(out) / "run",
            rounds=1,
            completions=args.completions,
            prompt_tokens=PROMPT,
            max_new_tokens=args.new_tokens,
            max_seq_length=PROMPT + args.new_tokens,
            batch_size=args.batch_size,
            loss=LossConfig(0.0, 1.0, divergence="jsd"),
            device="cpu",
            max_eval_samples=1,
        )

        def listen(progress) -> None:
            marks[progress.stage] = time.perf_counter() - began

        result = onpolicy.run(config, listen)
        seconds = time.perf_counter() - began
        forwards = open_dataset(Path(out) / "run" / "round-001" / "data").manifest["token_forwards"]
    print(
        json.dumps(
            {
                "tokens_per_second": result.written_tokens / seconds,
                "tokens": result.written_tokens,
                "token_forwards_a_text": forwards / result.texts,
                "until": {stage: round(mark, 2) for stage, mark in marks.items()},
                "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            }
        )
    )


def check_greedy(
    args: argparse.Namespace, peer: list[str], prompts: np.ndarray, count: int = 4
) -> None:
    """Stop unless both sides' students write the same most likely texts."""
    model = load_model(args.work / "student")
    ends = frozenset({model.config.eos_token_id}) - {None}
    limits = Limits(args.new_tokens, model.config.max_position_embeddings, ends, count)
    written = generate_batch(
        lambda rows, length: RowDecoder(model, rows, length),
        list(prompts[:count]),
        range(count),
        Sampling(temperature=0),
        limits,
    )
    theirs = figures_of([*peer, "--greedy", str(count)], args.threads)["greedy"]
    for ours, other in zip(written.texts, theirs, strict=True):
        if ours.tokens.tolist() != other[: len(ours.tokens)]:
            sys.exit(f"the greedy texts differ: {ours.tokens.tolist()[:20]} and {other[:20]}")
    print(
        f"greedy texts of {count} prompts: the same {args.new_tokens} tokens on both sides",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder with text/ and instruct/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--completions", type=int, default=256, help="texts of our round")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="texts in an optimiser step, on both sides"
    )
    parser.add_argument("--steps", type=int, default=3, help="the peer's; the first is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--ours", action="store_true", help="run our side alone, once everything is prepared"
    )
    args = parser.parse_args()
    if args.ours:
        our_side(args)
        return
    if args.data is None or args.peer_python is None:
        parser.error("--data and --peer-python are needed")
    args.work.mkdir(parents=True, exist_ok=True)
    print(describe(), flush=True)
    tokenizer = make_tokenizer(args.data, args.work)
    make_model(args.work / "teacher-0", TEACHER, tokenizer, 0)
    make_model(args.work / "student", STUDENT, tokenizer, 9)
    peps = args.work / "peps"
    if not peps.is_dir():
        xinslm(
            f"prepare --data-path {args.data}/text/peps.jsonl.gz --tokenizer-path {tokenizer} "
            f"--output-dir {peps} "
            f"--max-tokens 200000"
        )
    dataset = open_dataset(equal_blocks(peps, args.work / "prompts", 256))
    found = find_prompts(dataset, PROMPT, PROMPT)
    prompts = np.stack(found.take(np.arange(len(found))))
    np.save(args.work / "prompts.npy", prompts)
    here = Path(__file__)
    ours = [
        sys.executable,
        str(here),
        "--ours",
        "--work",
        str(args.work),
        "--completions",
        str(args.completions),
        "--new-tokens",
        str(args.new_tokens),
        "--batch-size",
        str(args.batch_size),
        "--threads",
        str(args.threads),
    ]
    peer = [
        args.peer_python,
        str(here.parent / "peers" / "trl_gkd_onpolicy.py"),
        "--teacher",
        str(args.work / "teacher-0"),
        "--student",
        str(args.work / "student"),
        "--prompts",
        str(args.work / "prompts.npy"),
        "--new-tokens",
        str(args.new_tokens),
        "--steps",
        str(args.steps),
        "--batch-size",
        str(args.batch_size),
        "--threads",
        str(args.threads),
    ]
    check_greedy(args, peer, prompts)
    sides = {
        "ours": ours,
        "gkd": peer,
        "gkd, gradient_checkpointing=False": [*peer, "--no-gradient-checkpointing"],
    }
    results = in_turn(sides, args.rounds, args.threads)
    keep(
        args.work,
        f"on-policy tokens/s, {PROMPT} + {args.new_tokens}",
        {side: median(found_, "tokens_per_second") for side, found_ in results.items()}
        | {
            f"ratio to {side}": ratios(results["ours"], results[side], "tokens_per_second")
            for side in list(sides)[1:]
        }
        | {f"peak MiB, {side}": median(found_, "peak_mib") for side, found_ in results.items()}
        | {
            f"share of generation, {side}": median(results[side], "generating")
            for side in list(sides)[1:]
        }
        | {"seconds of ours until": results["ours"][0]["until"]}
        | {"token-forwards a text, ours": results["ours"][0]["token_forwards_a_text"]},
    )


if __name__ == "__main__":
    main()
