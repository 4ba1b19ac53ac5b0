"""Do hidden-state matching and contrast help a small student at equal steps? Validation nats a
token, several seeds.

    python benchmarks/hidden_losses.py --data ../shared/data --work /tmp/hidden-losses

Teacher stories5M, a student of 0.4M parameters, one thread. Each variant sees the same rows in the
same order and starts from the same weights as the others of its seed, so differences are paired.
What is done is not done again.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from machine import describe

from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.data import prepare
from xinslm.data.config import PrepareConfig
from xinslm.distill.auxiliary_config import ContrastConfig, HiddenConfig
from xinslm.distill.config import DistillConfig
from xinslm.losses.config import LossConfig
from xinslm.train import run as train

KD, CE = LossConfig(), LossConfig(alpha=1.0, beta=0.0)
VARIANTS = {
    "KD": {"loss": KD},
    "KD + projector": {"loss": KD, "hidden": HiddenConfig(1.0)},
    "KD + CKA": {"loss": KD, "hidden": HiddenConfig(1.0, "cka")},
    "KD + InfoNCE": {"loss": KD, "contrast": ContrastConfig(0.05)},
    "CE": {"loss": CE},
    "CE + projector": {"loss": CE, "hidden": HiddenConfig(1.0)},
    "CE + InfoNCE": {"loss": CE, "contrast": ContrastConfig(0.05)},
}
STUDENT = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 192,
}
ROWS, LENGTH = 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("/tmp/hidden-losses"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, cache = make_cache(args.data, args.work, ROWS * LENGTH * args.steps)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    for seed in range(args.seeds):
        for name, settings in VARIANTS.items():
            results[name].append(run(name, settings, seed, args, data, cache))
    print(f"\n{describe()}")
    print(
        f"{args.steps} steps of {ROWS * LENGTH:,} tokens, {args.seeds} seeds, best validation "
        "in nats a token\n"
    )
    print("| loss | mean | standard deviation | against its base, seed by seed | step time |")
    print("|---|---|---|---|---|")
    for name, rows in results.items():
        losses, seconds = zip(*rows, strict=True)
        base = results[name.partition(" +")[0]]
        against = ", ".join(
            f"{ours - theirs:+.4f}" for ours, (theirs, _) in zip(losses, base, strict=True)
        )
        ratio = statistics.median(seconds) / statistics.median(s for _, s in base)
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(
            f"| {name} | {statistics.mean(losses):.4f} | {spread:.4f} | {against} | {ratio:.2f} |"
        )


def make_cache(shared: Path, work: Path, tokens: int) -> tuple[Path, Path]:
    """Enough stories for one epoch, and the teacher's cache of them with projected hidden states of
    two depths.
    """
    data, cache, text = work / "data", work / "cache", shared / "text"
    if not (data / "manifest.json").is_file():
        config = PrepareConfig(
            data_path=(str(text / "stories_train.jsonl.gz"),),
            validation_fraction=0.1,
            tokenizer_path=shared / "models" / "stories5M",
            output_dir=data,
            max_tokens=tokens,
        )
        prepare.run(config)
    if not (cache / "manifest.json").is_file():
        teacher = str(shared / "models" / "stories5M")
        config = CacheConfig(
            teacher,
            data,
            cache,
            max_seq_length=LENGTH,
            hidden_state_depths=(0.5, 1.0),
            device="cpu",
        )
        print(score.run(config).describe(), flush=True)
    return data, cache


def run(
    name: str, settings: dict, seed: int, args: argparse.Namespace, data: Path, cache: Path
) -> tuple[float, float]:
    """Best validation loss and seconds of one training run."""
    folder = args.work / f"{name.lower().replace(' + ', '-')}-{args.steps}-{seed}"
    state = folder / "checkpoints" / "last" / "training_state.json"
    if not state.is_file():
        config = DistillConfig(
            data_path=data,
            output_dir=folder,
            cache=cache,
            max_seq_length=LENGTH,
            batch_size=ROWS,
            max_steps=args.steps,
            learning_rate=4e-3,
            eval_steps=10_000,
            max_eval_samples=0,
            save_steps=10_000,
            logging_steps=10,
            seed=seed,
            device="cpu",
            **STUDENT,
            **settings,
        )
        train.run(config)
    found = json.loads(state.read_text())
    print(
        f"{name}, seed {seed}: {found['best_validation']:.4f} nats, {found['seconds']:.0f} s",
        flush=True,
    )
    return found["best_validation"], found["seconds"]


if __name__ == "__main__":
    main()
