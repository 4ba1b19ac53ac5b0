"""The peer of `distill`: TRL's GKDTrainer, off-policy, on given rows; prints one JSON line.

Runs in an environment of its own:
    python3 -m venv trl-venv && trl-venv/bin/pip install torch==2.13.0 && trl-venv/bin/pip install
    trl==1.16.0
    trl-venv/bin/python trl_gkd.py --teacher DIR --student DIR --rows rows.npz --steps 8
    --batch-size 4

`rows.npz` holds `input_ids` and `labels` (not shifted, -100 where nothing is learnt), one document
after another, with `offsets`; a batch is padded to its longest document, as TRL's collator does.
With `--valid` (the same form) validation cross-entropy is taken every `--eval-steps` steps, its
time not counted; with `--steps 0` only once, of the student as it is.
"""

import argparse
import itertools
import json
import resource
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


def load(path: str) -> list[dict[str, list[int]]]:
    """Documents of a file of rows."""
    stored = np.load(path)
    bounds = stored["offsets"]
    return [
        {"input_ids": stored["input_ids"][a:b].tolist(), "labels": stored["labels"][a:b].tolist()}
        for a, b in itertools.pairwise(bounds)
    ]


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Right-pad to the longest."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, pad: int) -> torch.Tensor:
        return torch.tensor([row[key] + [pad] * (longest - len(row[key])) for row in rows])

    ids, labels = padded("input_ids", 0), padded("labels", -100)
    mask = torch.tensor(
        [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    )
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "prompts": ids[:, :1],
        "prompt_attention_mask": mask[:, :1],
    }


def cross_entropy(model: torch.nn.Module, rows: list[dict[str, list[int]]]) -> float:
    """Validation loss, nats a target."""
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for at in range(0, len(rows), 8):
            batch = collate(rows[at : at + 8])
            logits = (
                model(batch["input_ids"], attention_mask=batch["attention_mask"])
                .logits[:, :-1]
                .float()
            )
            labels = batch["labels"][:, 1:]
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += int((labels >= 0).sum())
    model.train(was_training)
    return total / count


class Clock(TrainerCallback):
    """Time at the end of each step, with what validation took left out."""

    def __init__(self, valid: list[dict[str, list[int]]], every: int) -> None:
        self.valid, self.every = valid, every
        self.away, self.marks, self.curve = 0.0, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        """Note the time; validate where it is due."""
        now = time.perf_counter()
        self.marks.append(now - self.away)
        if self.valid and (
            state.global_step % self.every == 0 or state.global_step == args.max_steps
        ):
            self.curve.append((state.global_step, self.marks[-1], cross_entropy(model, self.valid)))
            self.away += time.perf_counter() - now


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` words, for a trainer that asks for one."""
    words = {f"t{i}": i for i in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t0")),
        pad_token="t0",
        eos_token="t0",
    )


def report(
    rows: list[dict[str, list[int]]],
    args: argparse.Namespace,
    clock: Clock,
    began: float,
    loss: float,
) -> None:
    """Print the figures of a run that began at `began`."""
    counts = [
        sum(
            sum(label >= 0 for label in row["labels"][1:])
            for row in rows[at : at + args.batch_size]
        )
        for at in range(0, args.steps * args.batch_size, args.batch_size)
    ]
    steady = (
        np.array(counts[2:]) / np.diff(clock.marks)[1:] if len(clock.marks) > 2 else np.zeros(1)
    )
    print(
        json.dumps(
            {
                "first_loss": loss,
                "tokens_per_second": float(np.median(steady)),
                "overall": sum(counts[1:]) / (clock.marks[-1] - clock.marks[0])
                if len(clock.marks) > 1
                else 0.0,
                "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
                "seconds": clock.marks[-1] - began,
                "curve": [(step, mark - began, value) for step, mark, value in clock.curve],
            }
        )
    )


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What both of TRL's trainers are told: the forward KL, AdamW along a cosine, nothing written."""
    return {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup_steps": args.warmup,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "beta": 0.0,
        "temperature": 1.0,
        "gradient_checkpointing": args.gradient_checkpointing,
        "bf16": args.bf16,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def arguments() -> argparse.ArgumentParser:
    """Options of a run."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="what TRL does unless told"
    )
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    return parser


def main() -> None:
    parser = arguments()
    parser.description = __doc__
    parser.add_argument("--valid")
    parser.add_argument("--eval-steps", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = load(args.rows)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32)
    if args.steps == 0:
        print(json.dumps({"validation": cross_entropy(student, load(args.valid))}))
        return
    tokenizer = word_tokenizer(student.config.vocab_size)
    first = collate(rows[: args.batch_size])
    with torch.no_grad():
        sides = [
            m(first["input_ids"], attention_mask=first["attention_mask"]).logits[:, :-1]
            for m in (student, teacher)
        ]
        loss = GKDTrainer.generalized_jsd_loss(
            *sides, labels=first["labels"][:, 1:], beta=0.0
        ).item()
    clock = Clock(load(args.valid) if args.valid else [], args.eval_steps)
    with tempfile.TemporaryDirectory() as out:
        config = GKDConfig(output_dir=out, lmbda=0.0, **settings(args))
        trainer = GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=config,
            data_collator=collate,
            train_dataset=Dataset.from_list(rows[: args.steps * args.batch_size]),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
            rows[: args.steps * args.batch_size],
            batch_size=args.batch_size,
            shuffle=False,
            collate_fn=collate,
        )
        began = time.perf_counter()
        trainer.train()
    report(rows, args, clock, began, loss)


if __name__ == "__main__":
    main()
