"""The peer of `pretrain`: transformers' own Trainer on given packed rows; prints one JSON line.

Runs in an environment of its own:
    python3 -m venv hf-venv && hf-venv/bin/pip install torch==2.13.0 && hf-venv/bin/pip install
    transformers==5.23.0 accelerate
    hf-venv/bin/python hf_trainer.py --model DIR --rows rows.npz --steps 20 --batch-size 16

`rows.npz` holds input_ids, labels (already shifted), positions and segments, each (rows, length):
the very rows that the other side trains on. Attention is confined to segments by a 4-d mask, so
both sides do the same work.
"""

import argparse
import json
import resource
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Rows(torch.utils.data.Dataset):
    """Packed rows, one an item."""

    def __init__(self, path: str, count: int) -> None:
        stored = np.load(path)
        self.arrays = {name: stored[name][:count] for name in stored.files}

    def __len__(self) -> int:
        return len(self.arrays["labels"])

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}


def collate(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Batch rows and build their block-diagonal causal masks."""
    batch = {name: torch.from_numpy(np.stack([item[name] for item in items])) for name in items[0]}
    segments = batch.pop("segments")
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = causal & (segments[:, :, None] == segments[:, None, :])
    batch["attention_mask"] = torch.zeros(allowed.shape).masked_fill(
        ~allowed, torch.finfo(torch.float32).min
    )[:, None]
    batch["position_ids"] = batch.pop("positions")
    return batch


class ShiftedTrainer(Trainer):
    """Labels come shifted: the mean over targets of the cross-entropy."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy of a batch."""
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits.float()
        loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
        return (loss, None) if return_outputs else loss


class Clock(TrainerCallback):
    """Time at the end of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Note the time."""
        self.marks.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rows = Rows(args.rows, args.steps * args.batch_size)
    first = collate([rows[i] for i in range(args.batch_size)])
    with torch.no_grad():
        labels = first.pop("labels")
        loss = F.cross_entropy(
            model(**first, use_cache=False).logits.flatten(0, 1), labels.flatten()
        ).item()
    clock = Clock()
    with tempfile.TemporaryDirectory() as out:
        settings = TrainingArguments(
            output_dir=out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            dataloader_num_workers=0,
            remove_unused_columns=False,
        )
        trainer = ShiftedTrainer(
            model=model, args=settings, train_dataset=rows, data_collator=collate, callbacks=[clock]
        )
        trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
            rows, batch_size=args.batch_size, shuffle=False, collate_fn=collate
        )
        trainer.train()
    targets = (rows.arrays["labels"] >= 0).reshape(args.steps, -1).sum(axis=1)
    speeds = targets[1:] / np.diff(clock.marks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {
                "first_loss": loss,
                "tokens_per_second": float(np.median(speeds)),
                "peak_mib": round(peak),
            }
        )
    )


if __name__ == "__main__":
    main()
