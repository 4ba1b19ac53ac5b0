"""The stage `adapt`: a LoRA adapter (Hu et al., arXiv:2106.09685) that fits a teacher to the data
it is to teach on.

    xinslm adapt TEACHER --data-path data --output-dir adapter
    xinslm cache TEACHER --adapter adapter --data-path data --output-dir cache

A teacher predicts text of the kind it was last trained on better and with more confidence; a few
million tokens are enough ("teacher correction", arXiv:2408.11796, section 2). The loss is the
next-token loss on the dataset's targets. The output is a run folder; the adapter is written to its
top when training has ended.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from xinslm.config import to_dict
from xinslm.data.dataset import open_dataset, require_tokenizer
from xinslm.device import pick_device
from xinslm.errors import UsageError
from xinslm.files import MANIFEST, write_manifest
from xinslm.folders import locked
from xinslm.losses.config import LossConfig
from xinslm.losses.fused import HeadOptions, LossMetrics, fused_loss
from xinslm.losses.memory import HeadMemory
from xinslm.model.files import open_model, require_context
from xinslm.progress import Listener, ignore
from xinslm.teachers.adapter import KIND, VERSION, WEIGHTS, require_peft
from xinslm.teachers.huggingface import HuggingFaceTeacher
from xinslm.train.checkpoint import CHECKPOINTS, TrainingState
from xinslm.train.interfaces import AuxiliaryLoss, Metrics, Operations
from xinslm.train.loop import Trainer, train
from xinslm.train.lora_config import AdaptConfig
from xinslm.train.padded import PaddedBatch, PaddedSequences
from xinslm.train.recorder import METRICS, RunRecorder, resume, validation_before
from xinslm.train.run import CONFIG, RUN, claim_run, note_facts, require_unfinished


@dataclass(frozen=True)
class AdaptResult:
    """What `adapt` made; losses in nats per target token."""

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
                    "learning rate, or more data"
                )
        return "\n".join([*lines, f"trained     {self.steps:,} steps in {self.seconds:.0f} s"])


def run(config: AdaptConfig, on_progress: Listener = ignore) -> AdaptResult:
    """Train an adapter on the train split of a dataset.

    Raises UsageError for a dataset with another tokenizer, a missing peft and an output folder that
    holds something else; XinslmError at the first loss that is not finite; Interrupted (after a
    checkpoint) on Ctrl-C.
    """
    config.check()
    started, peft = time.monotonic(), require_peft()
    dataset = open_dataset(config.data_path)
    with locked(config.output_dir):
        with claim_run(config, "adapt", ("teacher", "data_path")):
            teacher = HuggingFaceTeacher(
                open_model(config.teacher, config.revision),
                config.compute_dtype if config.compute_dtype != "auto" else "float32",
                pick_device(config.device),
                config.trust_remote_code,
            )
            require_tokenizer(dataset, teacher.tokenizer.fingerprint(), f"teacher {config.teacher}")
            require_context(config.max_seq_length, teacher.max_length, f"teacher {config.teacher}")
            inputs = {
                "teacher": teacher.fingerprint,
                "dataset": dataset.fingerprint,
                "tokenizer": dataset.tokenizer_fingerprint,
            }
            adapted = _add_adapter(peft, teacher, config)
            objective = LoraObjective(teacher, PaddedSequences(dataset, config), config)
            steps = config.max_steps or objective.data.steps(config.num_epochs)
            trainer = Trainer(objective, config, steps)
            facts = {"total_steps": steps, "inputs": inputs}
            note_facts(config.output_dir, facts, teacher.device)
            state = resume(trainer, _weights)
            if (config.output_dir / MANIFEST).is_file():
                require_unfinished(config.output_dir, state, steps)
        recorder = RunRecorder(
            trainer, state, _writer(adapted), on_progress, "adapt", False, keep_best=False
        )
        if state.step == 0 and objective.has_held_out:
            recorder.validation(trainer.validate(), TrainingState())
        state = train(trainer, state, recorder)
        before, after = validation_before(config.output_dir), state.best_validation
        _finish(config, inputs, state, {"before": before, "after": after})
    count = sum(weight.numel() for weight in teacher.model.parameters() if weight.requires_grad)
    return AdaptResult(
        config.output_dir, count, state.step, before, after, time.monotonic() - started
    )


def _finish(
    config: AdaptConfig, inputs: dict[str, str], state: TrainingState, validation: dict[str, Any]
) -> None:
    """Write the manifest of the adapter, which the last checkpoint put at the top of the run."""
    write_manifest(
        config.output_dir,
        KIND,
        VERSION,
        to_dict(config),
        inputs,
        skip=(CONFIG, RUN, METRICS, CHECKPOINTS),
        steps=state.step,
        validation=validation,
    )


def _add_adapter(peft: Any, teacher: HuggingFaceTeacher, config: AdaptConfig) -> Any:
    """Give the teacher's matrices trainable low-rank updates, which are 0 at first."""
    targets = (
        "all-linear" if config.target_modules == ("all-linear",) else list(config.target_modules)
    )
    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    if config.gradient_checkpointing:
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


def _writer(adapted: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)

    return write


def _weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's adapter under the names that its parameters have in the model."""
    for name, tensor in load_file(folder / WEIGHTS).items():
        stem, _, last = name.removeprefix("base_model.model.").rpartition(".")
        yield f"{stem}.default.{last}", tensor


class LoraObjective:
    """Next-token loss of an adapted Hugging Face model on padded sequences; an `Objective`."""

    def __init__(
        self, teacher: HuggingFaceTeacher, data: PaddedSequences, config: AdaptConfig
    ) -> None:
        self.teacher, self.data, self.config = teacher, data, config
        self.auxiliary: AuxiliaryLoss | None = None
        self.operations: Operations | None = None
        self._memory = None if config.gradient_checkpointing else HeadMemory()

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        model: nn.Module = self.teacher.model
        return model

    @property
    def has_held_out(self) -> bool:
        """Whether there is data to validate on."""
        return self.data.has_held_out

    def micro_batches(self, step: int) -> list[PaddedBatch]:
        """Sequences of a step."""
        return self.data.micro_batches(step)

    def held_out(self) -> Iterator[PaddedBatch]:
        """Validation sequences."""
        return self.data.held_out()

    def documents(self, micro: PaddedBatch) -> np.ndarray:
        """Documents of a micro-batch."""
        return micro.documents

    def loss(
        self, micro: PaddedBatch, normaliser: float, step: int | None
    ) -> tuple[Tensor, LossMetrics, Metrics]:
        """Cross-entropy of a micro-batch; dropout is drawn from the seed, the step and the data."""
        with torch.random.fork_rng(enabled=self.config.lora_dropout > 0):
            if step is not None and self.config.lora_dropout > 0:
                draw = np.random.default_rng((self.config.seed, step, int(micro.documents[0])))
                torch.manual_seed(int(draw.integers(2**31)))
            loss = self._nats(micro, normaliser)
        return loss, LossMetrics(loss.item() * normaliser, 0.0), {}

    def _nats(self, micro: PaddedBatch, normaliser: float) -> Tensor:
        teacher, device = self.teacher, self.teacher.device
        chosen = micro.labels.reshape(-1) >= 0
        labels = micro.labels.reshape(-1)[chosen].to(device)
        ids, vocab_size = micro.ids.to(device), teacher.vocab_size
        head = teacher.model.get_output_embeddings()
        if teacher.has_plain_head and type(head) is nn.Linear:  # an adapted head is another class
            backbone = getattr(teacher.model, teacher.model.base_model_prefix)
            hidden = backbone(input_ids=ids, use_cache=False)[0]
            rows = hidden.reshape(-1, hidden.shape[-1])[chosen.to(device)]
            bias = None if head.bias is None else head.bias[:vocab_size]
            text_only = LossConfig(alpha=1.0, beta=0.0)
            return fused_loss(
                rows,
                head.weight[:vocab_size],
                labels,
                None,
                text_only,
                normaliser,
                HeadOptions(bias, memory=self._memory),
            )[0]
        logits = teacher.model(input_ids=ids, use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1])[chosen.to(device), :vocab_size]
        return F.cross_entropy(logits.float(), labels, reduction="sum") / normaliser
