"""The stage `adapt`: a LoRA adapter (Hu et al., arXiv:2106.09685) that fits a teacher to the data
it is to teach on.

    xinslm adapt TEACHER --data-path data --output-dir adapter
    xinslm cache TEACHER --adapter adapter --data-path data --output-dir cache

A teacher is surer, and right more often, on text of the kind it was last trained on; a few million
tokens are enough ("teacher correction", arXiv:2408.11796, section 2). The loss is the plain
next-token loss on the dataset's targets; sequences are batched by length, each in a row of its own.
The folder is written when training has ended, or not at all; the same command continues a killed
one, and ends with the same weights.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, Split, open_dataset, require_tokenizer
from xinslm.data.packing import IGNORE, sequences
from xinslm.device import pick_device
from xinslm.errors import UsageError, XinslmError
from xinslm.files import new_folder, refuse_existing, refuse_inside, write_manifest
from xinslm.model.files import require_context
from xinslm.progress import Listener, Progress, ignore
from xinslm.teachers.adapter import KIND, VERSION, require_peft
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.teachers.local import batches_by_length
from xinslm.train.lora_config import AdaptConfig
from xinslm.train.lora_state import AdaptState


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` made; losses in nats a target token."""

    folder: Path
    parameters: int
    steps: int
    before: float | None
    after: float | None
    seconds: float

    def describe(self) -> str:
        """Lines for the terminal."""
        lines = [f"adapter     {self.folder} ({self.parameters:,} parameters)"]
        if self.before is not None and self.after is not None:
            lines.append(f"validation  {self.before:.4f} -> {self.after:.4f} nats a token")
            if self.after >= self.before:
                lines.append(
                    "note        the adapter does not help: use fewer steps, a lower "
                    "rate, or more data"
                )
        return "\n".join([*lines, f"trained     {self.steps:,} steps in {self.seconds:.0f} s"])


def run(config: AdaptConfig, on_progress: Listener = ignore) -> AdaptResult:
    """Train an adapter on the train split of a dataset.

    Raises UsageError for a dataset of another tokenizer, a missing peft and an output folder that
    holds something; XinslmError at the first loss that is not finite.
    """
    config.check()
    started = time.monotonic()
    peft = require_peft()
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (config.teacher, config.data_path))
    dataset = open_dataset(config.data_path)
    teacher = HuggingFaceTeacher(
        config.teacher,
        config.dtype,
        pick_device(config.device),
        config.revision,
        config.trust_remote_code,
    )
    require_tokenizer(dataset, teacher.tokenizer.fingerprint(), f"teacher {config.teacher}")
    require_context(config.max_seq_length, teacher.max_length, f"teacher {config.teacher}")
    base = teacher.fingerprint
    state = AdaptState(
        config.output_dir,
        {"config": _plan(config), "teacher": base, "dataset": dataset.fingerprint},
    )
    if config.force:
        state.remove()
    done, before = state.look()
    adapted = _put_adapter(peft, teacher, config)
    training = _Batches(dataset.split("train"), config.max_seq_length, config.batch_tokens)
    held_out = _held_out(dataset, config)
    before = before if done else _validate(teacher, held_out)
    steps = _train(teacher, training, config, state, done, before, on_progress)
    after = _validate(teacher, held_out)
    count = sum(weight.numel() for weight in teacher.model.parameters() if weight.requires_grad)
    with new_folder(config.output_dir, config.force) as folder:
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        inputs = {
            "teacher": base,
            "dataset": dataset.fingerprint,
            "tokenizer": dataset.tokenizer_fingerprint,
        }
        write_manifest(
            folder,
            KIND,
            VERSION,
            to_dict(config),
            inputs,
            steps=steps,
            validation={"before": before, "after": after},
        )
    state.remove()
    return AdaptResult(config.output_dir, count, steps, before, after, time.monotonic() - started)


def _put_adapter(peft: Any, teacher: HuggingFaceTeacher, config: AdaptConfig) -> Any:
    """Give the teacher's matrices trainable updates, which are 0 at first."""
    targets = (
        "all-linear" if config.target_modules == ("all-linear",) else list(config.target_modules)
    )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if config.checkpointing:
        teacher.model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        try:
            return peft.get_peft_model(teacher.model, settings)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise UsageError(
                f"--target-modules {' '.join(config.target_modules)}: {first}"
            ) from None


class _Batches:
    """A split as batches of sequences of similar length; a sequence without a target is left
    out.
    """

    def __init__(self, split: Split, max_seq_length: int, batch_tokens: int) -> None:
        self.split = split
        starts, lengths = sequences(split.documents, max_seq_length)
        targets = np.concatenate([[0], np.cumsum(split.mask, dtype=np.int64)])
        counts = targets[starts + lengths + 1] > targets[starts + 1]
        self.starts, self.lengths = starts[counts], lengths[counts]
        self.batches = list(batches_by_length(self.lengths, batch_tokens))
        if not self.batches:
            raise XinslmError("the dataset has no token to learn: every document's mask is empty")

    def __len__(self) -> int:
        return len(self.batches)

    def get(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of a batch, (rows, longest) int64 each; labels are the next tokens,
        -100 elsewhere.
        """
        chosen = self.batches[index]
        width = int(self.lengths[chosen].max())
        ids = np.zeros((len(chosen), width), dtype=np.int64)
        labels = np.full((len(chosen), width), IGNORE, dtype=np.int64)
        for row, k in enumerate(chosen):
            start, length = int(self.starts[k]), int(self.lengths[k])
            following = self.split.tokens[start + 1 : start + length + 1].astype(np.int64)
            ids[row, :length] = self.split.tokens[start : start + length]
            labels[row, :length] = np.where(
                self.split.mask[start + 1 : start + length + 1] != 0, following, IGNORE
            )
        return torch.from_numpy(ids), torch.from_numpy(labels)


def _nats(teacher: HuggingFaceTeacher, ids: Tensor, labels: Tensor, normaliser: float) -> Tensor:
    """Cross-entropy of a batch's targets, summed and divided by `normaliser`."""
    from xinslm.losses.config import LossConfig
    from xinslm.losses.fused import fused_loss

    chosen = labels.reshape(-1) != IGNORE
    wanted = labels.reshape(-1)[chosen].to(teacher.device)
    ids = ids.to(teacher.device)
    head = teacher.model.get_output_embeddings()
    if teacher.has_plain_head and type(head) is nn.Linear:  # an adapted head is another class
        hidden = getattr(teacher.model, teacher.model.base_model_prefix)(
            input_ids=ids, use_cache=False
        )[0]
        rows = hidden.reshape(-1, hidden.shape[-1])[chosen.to(teacher.device)]
        bias = None if head.bias is None else head.bias[: teacher.vocab_size]
        weight = head.weight[: teacher.vocab_size]
        return fused_loss(
            rows, weight, wanted, None, LossConfig(alpha=1.0, beta=0.0), normaliser, bias=bias
        )[0]
    logits = teacher.model(input_ids=ids, use_cache=False).logits
    logits = logits.reshape(-1, logits.shape[-1])[chosen.to(teacher.device), : teacher.vocab_size]
    return F.cross_entropy(logits.float(), wanted, reduction="sum") / normaliser


def _held_out(dataset: Dataset, config: AdaptConfig) -> list[tuple[Tensor, Tensor]]:
    """Batches to measure on, of about `validation_tokens` targets."""
    if "validation" not in dataset.manifest["splits"] or not len(
        dataset.split("validation").tokens
    ):
        return []
    batches = _Batches(dataset.split("validation"), config.max_seq_length, config.batch_tokens)
    chosen, count = [], 0
    for index in np.random.default_rng(0).permutation(len(batches)):
        chosen.append(batches.get(int(index)))
        count += int((chosen[-1][1] != IGNORE).sum())
        if config.validation_tokens and count >= config.validation_tokens:
            break
    return chosen


@torch.no_grad()
def _validate(teacher: HuggingFaceTeacher, batches: list[tuple[Tensor, Tensor]]) -> float | None:
    if not batches:
        return None
    teacher.model.eval()
    total = sum(_nats(teacher, ids, labels, 1.0).item() for ids, labels in batches)
    return total / sum(int((labels != IGNORE).sum()) for _, labels in batches)


def _order(count: int, seed: int) -> Iterator[int]:
    """Indices of batches without end, all of them in every epoch."""
    epoch = 0
    while True:
        yield from np.random.default_rng((seed, epoch)).permutation(count).tolist()
        epoch += 1


def _plan(config: AdaptConfig) -> dict[str, Any]:
    """What the weights follow from: all settings but where things stand and how often they are
    saved.
    """
    places = ("output_dir", "data_path", "teacher", "device", "force", "save_every")
    return {name: value for name, value in to_dict(config).items() if name not in places}


def _train(
    teacher: HuggingFaceTeacher,
    batches: _Batches,
    config: AdaptConfig,
    state: AdaptState,
    done: int,
    before: float | None,
    on_progress: Listener,
) -> int:
    """Train what requires gradients, from step `done` on; return the number of steps."""
    total = config.max_steps or max(1, round(config.num_epochs * len(batches)))
    weights = [weight for weight in teacher.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, weight_decay=0.0)
    warmup = config.warmup_fraction * total
    teacher.model.train()
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # of dropout
        if done:
            state.restore(weights, optimizer)
            on_progress(
                Progress("adapt", done, total, "steps", note=f"continuing after step {done}")
            )
        order = islice(_order(len(batches), config.seed), done, None)
        for step, index in zip(range(done, total), order, strict=False):
            ids, labels = batches.get(index)
            rising, falling = (
                min(1.0, (step + 1) / max(warmup, 1)),
                (total - step) / max(total - warmup, 1),
            )
            optimizer.param_groups[0]["lr"] = config.learning_rate * min(rising, falling, 1.0)
            optimizer.zero_grad(set_to_none=True)
            loss = _nats(teacher, ids, labels, float((labels != IGNORE).sum()))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(weights, config.clip_norm or math.inf).item()
            if not math.isfinite(loss.item()) or not math.isfinite(norm):
                raise XinslmError(
                    f"the loss is {loss.item()} and its gradient {norm} at step {step + 1}: "
                    "training has stopped, "
                    "no adapter is written. Try --force with a smaller --learning-rate, or "
                    "--dtype float32"
                )
            optimizer.step()
            rate = optimizer.param_groups[0]["lr"]
            on_progress(
                Progress("adapt", step + 1, total, "steps", {"loss": loss.item(), "lr": rate})
            )
            if (step + 1) % config.save_every == 0 and step + 1 < total:
                state.save(step + 1, before, weights, optimizer)
    return total
