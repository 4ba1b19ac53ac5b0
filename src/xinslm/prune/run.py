"""`xinslm prune`: make a smaller model from the weights of a teacher.

    xinslm prune TEACHER --data-path data --output-dir student0 --num-layers 4 --hidden-size 192
    xinslm distill --data-path data --cache cache --init-from student0 --output-dir runs/student

Vocabulary, layers, heads and neurons are cut first, at the teacher's width, then the width. Finally
the remaining weights are fitted to the teacher's activations. The table shows the loss after each
step, in nats per token on validation text.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xinslm.baseline import uninformed
from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, open_dataset
from xinslm.data.packing import PackedDataset
from xinslm.data.unigram import unigram_nats
from xinslm.device import pick_device
from xinslm.errors import UsageError, XinslmError
from xinslm.files import write_manifest
from xinslm.folders import new_folder, refuse_existing, refuse_inside
from xinslm.model.config import ModelConfig
from xinslm.model.files import save_model
from xinslm.model.transformer import Transformer
from xinslm.precision import compute_dtype
from xinslm.progress import Listener, Progress, ignore
from xinslm.prune.choose import choose_by_influence, choose_by_loss
from xinslm.prune.config import PruneConfig
from xinslm.prune.cuts import (
    HEAD,
    Weights,
    assemble,
    choose_neurons,
    keep_layers,
    keep_neurons,
    keep_vocabulary,
    vocabulary_rows,
)
from xinslm.prune.heads import Group, choose_heads, keep_heads
from xinslm.prune.measure import Passage, Statistics, loss, measure, read_passages
from xinslm.prune.shape import find_teacher, merged_heads, student_shape
from xinslm.prune.transplant import CutModel, compensate, narrow, principal_directions
from xinslm.tokenizer.load import load_tokenizer

KIND, VERSION = "model", 1
_TOKENS_FOR_INFLUENCE = 16384
"""The influence of SmolLM2's layers on 8,192 and on 25,000 tokens differs by less than 3 %."""


@dataclass(frozen=True)
class PruneResult:
    """The pruned model, and the loss after each step."""

    folder: Path
    losses: tuple[tuple[str, int, float], ...]
    """For each step: name, parameters, validation loss in nats per token."""
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        """Lines for the terminal."""
        width = max(len(name) for name, _, _ in self.losses)
        lines = [f"{'':<{width}} {'parameters':>15} {'nats/token':>11}"]
        lines += [
            f"{name:<{width}} {parameters:>15,} {value:>11.4f}"
            for name, parameters, value in self.losses
        ]
        return "\n".join(
            [*lines, *(f"note  {note}" for note in self.notes), f"written to {self.folder}"]
        )


def run(config: PruneConfig, on_progress: Listener = ignore) -> PruneResult:
    """Prune a teacher and write the student as a model folder.

    Raises UsageError if shape, tokenizer or folders do not match, XinslmError if such a teacher
    cannot be pruned.
    """
    config.check()
    refuse_existing(config.output_dir, config.force)
    if config.force:
        refuse_inside(config.output_dir, (config.teacher, config.data_path))
    source, shape = find_teacher(config.teacher)
    dataset = open_dataset(config.data_path)
    tokenizer = load_tokenizer(dataset.folder / "tokenizer")
    student = student_shape(config, shape, tokenizer.vocab_size)
    theirs = load_tokenizer(config.teacher)
    if theirs.vocab_size > shape.vocab_size:
        raise XinslmError(
            f"{config.teacher}: its tokenizer has {theirs.vocab_size} ids, its embedding only "
            f"{shape.vocab_size} rows; the tokenizer belongs to another model"
        )
    rows = vocabulary_rows(tokenizer, theirs, str(dataset.folder))
    device = pick_device(config.device)
    text = _Text.read(config, dataset, shape, device)
    teacher = source.transformer().to(device).requires_grad_(False)
    ids: dict[str, Any] = {}
    name = "teacher"
    if rows != list(range(theirs.vocab_size)):
        ids = {
            f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in ("bos", "eos", "pad")
        }
        name = f"teacher, vocabulary cut to {len(rows):,}"
    work = _Cutting(config, text, on_progress)
    with torch.no_grad():
        made = work.cut(keep_vocabulary(teacher, rows, ids), student, name)
        content = {"losses": [list(row) for row in work.losses], **work.facts}
        with new_folder(config.output_dir, config.force) as partial:
            save_model(made, partial)
            tokenizer.save(partial)
            inputs = {"teacher": source.fingerprint, "dataset": dataset.fingerprint}
            write_manifest(partial, KIND, VERSION, to_dict(config), inputs, **content)
    return PruneResult(config.output_dir, tuple(work.losses), (*text.notes, *work.notes))


@dataclass(frozen=True)
class _Text:
    """Disjoint rows: for activations, for choices, and for the reported losses."""

    calibration: list[Passage]
    search: list[Passage]
    validation: list[Passage]
    baseline: float | None
    """Nats per target token that token frequencies alone give on the validation rows."""
    notes: tuple[str, ...] = ()

    @staticmethod
    def read(
        config: PruneConfig, dataset: Dataset, teacher: ModelConfig, device: torch.device
    ) -> "_Text":
        length = config.max_seq_length or min(teacher.max_position_embeddings, 512)
        if length > teacher.max_position_embeddings:
            raise UsageError(
                f"max_seq_length is {length}, but the teacher reads at most "
                f"{teacher.max_position_embeddings} tokens"
            )
        split = dataset.split("train")
        count = len(PackedDataset(split, length))
        if count < 2:
            raise UsageError(
                f"{dataset.folder} has {count} rows of {length} tokens to train on, but at least "
                "2 are needed, one to measure on and one to choose by: use more text, or a smaller "
                "--max-seq-length"
            )
        dtype = compute_dtype(config.compute_dtype, device)
        searched = min(config.num_search_samples, max(1, count // 4))
        order = np.random.default_rng(config.seed).permutation(count)
        search = read_passages(split, length, order[:searched], device, dtype)
        calibration = read_passages(
            split, length, order[searched:][: config.num_calibration_samples], device, dtype
        )
        held_out = (
            dataset.split("validation") if "validation" in dataset.manifest["splits"] else None
        )
        number = 0 if held_out is None else len(PackedDataset(held_out, length))
        if held_out is None or number == 0:
            note = (
                "there is no validation split: losses are measured on the rows of the train "
                "split that choices were made on"
            )
            baseline = unigram_nats(dataset, "train")
            return _Text(calibration, search, search, baseline, (note,))
        chosen = np.random.default_rng(config.seed).permutation(number)[: config.max_eval_samples]
        validation = read_passages(held_out, length, chosen, device, dtype)
        return _Text(calibration, search, validation, unigram_nats(dataset, "validation"))


class _Between(ModelConfig):
    """An intermediate shape: heads that do not divide the teacher's width may divide the
    student's.
    """

    def check(self) -> None:
        """Accept any shape."""


class _Cutting:
    """The steps from teacher to student, each measured on validation text."""

    def __init__(self, config: PruneConfig, text: _Text, on_progress: Listener) -> None:
        self.config, self.text, self.on_progress = config, text, on_progress
        self.losses: list[tuple[str, int, float]] = []
        self.facts: dict[str, Any] = {}
        self.notes: list[str] = []

    def cut(self, teacher: Transformer, student: ModelConfig, name: str) -> Transformer:
        """Cut `teacher`, which has the student's vocabulary already, to the student's shape."""
        shape = teacher.config
        self._report(name, teacher)
        roles = ("bos_token_id", "eos_token_id", "pad_token_id")
        student = replace(student, **{role: getattr(shape, role) for role in roles})
        if student == shape:
            return teacher
        found = self._measured(teacher, student)
        kept = self._layers(teacher, student, found)
        self.facts["influence"] = [layer.influence for layer in found.layers]
        self.facts["layers"] = kept
        thin = keep_layers(shape, teacher.state_dict(), kept)
        if len(kept) < shape.num_hidden_layers:
            self._report(f"{len(kept)} of {shape.num_hidden_layers} layers: {_spans(kept)}", thin)
        thin = self._heads(thin, student, kept, found)
        thin = self._neurons(thin, student, kept, found)
        basis, plain = None, thin
        if student.hidden_size < shape.hidden_size:
            basis = principal_directions(found.stream, student.hidden_size)
            held = float((basis * (found.stream @ basis)).sum() / found.stream.trace())
            self.facts["stream_kept"] = held
            plain = narrow(thin, student, basis, found)
            self._report(
                f"width {student.hidden_size} of {shape.hidden_size}, {held:.1%} of the stream",
                plain,
            )
        else:
            head = {} if student.tie_word_embeddings else {HEAD: thin.head_weight.clone()}
            plain = assemble(student, dict(thin.state_dict()) | head)
        made = plain
        if self.config.compensate:
            made = self._compensated(teacher, CutModel(thin, plain, kept, basis))
        random = Transformer(student)
        random.initialise(torch.Generator().manual_seed(self.config.seed))
        self._report(
            "random weights of that shape", random.to(made.model.embed_tokens.weight.device).eval()
        )
        return made

    def _measured(self, teacher: Transformer, student: ModelConfig) -> Statistics:
        shape = teacher.config
        text = self.text.calibration
        if student == replace(shape, num_hidden_layers=student.num_hidden_layers):
            text = text[: max(1, _TOKENS_FOR_INFLUENCE // text[0].ids.numel())]
        return measure(
            teacher,
            text,
            self._progress("measure", shape.num_hidden_layers, "layers"),
            with_inputs=merged_heads(shape, student) > 1,
            with_stream=student.hidden_size < shape.hidden_size,
        )

    def _layers(self, teacher: Transformer, student: ModelConfig, found: Statistics) -> list[int]:
        total, wanted = teacher.config.num_hidden_layers, student.num_hidden_layers
        if self.config.layers == "influence":
            return choose_by_influence([layer.influence for layer in found.layers], wanted)
        progress = self._progress("choose layers", total - wanted, "layers")
        return choose_by_loss(teacher, wanted, self.text.search, progress)

    def _heads(
        self, thin: Transformer, student: ModelConfig, kept: list[int], found: Statistics
    ) -> Transformer:
        shape = thin.config
        heads, shared = student.num_attention_heads, student.num_key_value_heads
        if (heads, shared) == (shape.num_attention_heads, shape.num_key_value_heads):
            return thin
        weights, groups = dict(thin.state_dict()), []
        for index, layer in enumerate(kept):
            own = _layer(weights, index)
            chosen: list[Group] = choose_heads(shape, student, own, found.layers[layer])
            cut = keep_heads(own, chosen, found.layers[layer].inputs, shape.head_dim)
            weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in cut.items()}
            groups.append([[list(group.key_values), list(group.queries)] for group in chosen])
        self.facts["heads"] = groups
        between = _Between(
            **asdict(shape) | {"num_attention_heads": heads, "num_key_value_heads": shared}
        )
        thin = assemble(between, weights)
        self._report(f"{heads} query heads on {shared}", thin)
        return thin

    def _neurons(
        self, thin: Transformer, student: ModelConfig, kept: list[int], found: Statistics
    ) -> Transformer:
        shape = thin.config
        if student.intermediate_size == shape.intermediate_size:
            return thin
        weights, neurons = dict(thin.state_dict()), []
        for index, layer in enumerate(kept):
            own = _layer(weights, index)
            chosen = choose_neurons(
                found.layers[layer].neurons, own["mlp.down_proj.weight"], student.intermediate_size
            )
            weights |= {
                f"model.layers.{index}.{name}": t for name, t in keep_neurons(own, chosen).items()
            }
            neurons.append(chosen.tolist())
        self.facts["neurons"] = neurons
        thin = assemble(replace(shape, intermediate_size=student.intermediate_size), weights)
        self._report(f"{student.intermediate_size} of {shape.intermediate_size} neurons", thin)
        return thin

    def _compensated(self, teacher: Transformer, cut: CutModel) -> Transformer:
        """Return the fitted student if it is better than the plain one on rows that neither was
        fitted to.
        """
        progress = self._progress("compensate", len(cut.kept), "layers")
        fitted = compensate(teacher, cut, self.text.calibration, self.config.ridge, progress)
        before, after = loss(cut.plain, self.text.search), loss(fitted, self.text.search)
        self.facts["compensation"] = {"plain": before, "fitted": after}
        if not after < before:  # also if it is NaN
            self.notes.append(
                f"the least-squares fit was dropped: {after:.4f} nats on search rows, "
                f"{before:.4f} before"
            )
            return cut.plain
        self._report("fitted to the teacher's activations", fitted)
        return fitted

    def _report(self, name: str, model: Transformer) -> None:
        value = loss(model, self.text.validation)
        if not math.isfinite(value) and not self.losses:
            raise XinslmError(
                f"the loss of {self.config.teacher} is {value} on validation text: its weights "
                "are damaged"
            )
        warning = uninformed(name, value, self.text.baseline, "nats per token")
        if warning and not self.losses:  # the first is the teacher's
            self.notes.append(warning)
            self.on_progress(Progress("prune", note=warning))
        self.losses.append((name, model.config.num_parameters, value))
        self.on_progress(Progress("prune", values={"nats/token": value}, note=name))

    def _progress(self, stage: str, total: int, unit: str) -> Any:
        return lambda done: self.on_progress(Progress(stage, done, total, unit))


def _layer(weights: Weights, index: int) -> Weights:
    prefix = f"model.layers.{index}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.items()
        if name.startswith(prefix)
    }


def _spans(numbers: Sequence[int]) -> str:
    """'0-3, 7' for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
