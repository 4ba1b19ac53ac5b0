"""The stage `onpolicy`: rounds in which the student generates, the teacher scores, and the student
trains.

    xinslm onpolicy --student S --teacher T --prompts data --output-dir runs/onpolicy

Each round has a folder: `data`, the texts as a dataset; `cache`, the teacher's targets on them,
made by the cache stage; `round.json`, the steps trained on them. Teacher and student are never in
memory together. Finished parts are not repeated, so the same command continues a stopped run. The
optimizer state is kept from round to round. `checkpoints/last` is the newest checkpoint,
`checkpoints/best` the end of the newest complete round: reverse divergences improve generated text
without lowering the validation loss.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from xinslm.cache import score
from xinslm.cache.config import CacheConfig
from xinslm.cache.folder import Cache
from xinslm.cache.kinds import CachedTargets
from xinslm.cache.support import TEACHERS
from xinslm.config import to_dict
from xinslm.data.dataset import Dataset, open_dataset, require_tokenizer
from xinslm.data.packing import PackedDataset
from xinslm.device import pick_device
from xinslm.errors import UsageError
from xinslm.files import MANIFEST, manifest_fingerprint, read_json, write_json
from xinslm.folders import locked, remove_partials
from xinslm.inference.config import EngineName
from xinslm.inference.load import library_note
from xinslm.model.decode import RowDecoder, token_bytes
from xinslm.model.files import load_model, open_model, read_tensors, require_context
from xinslm.progress import Listener, Progress, ignore
from xinslm.rollouts.native_writer import open_batch
from xinslm.rollouts.onpolicy_config import OnPolicyConfig
from xinslm.rollouts.student_texts import Prompts, find_prompts, write_texts
from xinslm.teachers.endpoint import is_endpoint
from xinslm.teachers.generate import Limits, OpenDecoder, generate_batch
from xinslm.teachers.open import teacher_fingerprint
from xinslm.tokenizer.chat import end_ids
from xinslm.tokenizer.load import load_tokenizer
from xinslm.train.checkpoint import CHECKPOINTS, TrainingState, last_checkpoint, read_state
from xinslm.train.loop import Trainer, learning_rate, train
from xinslm.train.packed import PackedObjective, validation_data
from xinslm.train.recorder import RunRecorder, resume
from xinslm.train.row_sampler import RowSampler, Source, indices_of_step
from xinslm.train.run import begun_dtype, claim_run, note_facts, write_model

ROUND = "round.json"
PATHS = ("student", "teacher", "prompts", "mix_data", "mix_cache")


@dataclass(frozen=True)
class OnPolicyResult:
    """Result of a run."""

    folder: Path
    rounds: int
    state: TrainingState
    texts: int
    written_tokens: int

    def describe(self) -> str:
        """Lines for the terminal."""
        return (
            f"model       {self.folder}\n"
            f"written     {self.texts:,} texts, {self.written_tokens:,} tokens in {self.rounds} "
            "rounds\n"
            f"trained     {self.state.step:,} steps, {self.state.tokens:,} tokens in "
            f"{self.state.seconds:.0f} s"
        )


@dataclass(frozen=True)
class _Inputs:
    """Inputs of all rounds."""

    config: OnPolicyConfig
    dataset: Dataset
    prompts: Prompts
    tokenizer: Any
    device: torch.device
    mix: Dataset | None

    def folder(self, number: int) -> Path:
        """Folder of round `number`, from 0."""
        return self.config.output_dir / f"round-{number + 1:03d}"


def run(config: OnPolicyConfig, on_progress: Listener = ignore) -> OnPolicyResult:
    """Train in rounds.

    Raises UsageError if student, teacher, prompts and mixed-in data do not fit each other, or if
    the run folder holds something else; Interrupted (after a checkpoint) on Ctrl-C during training.
    """
    config.check()
    with locked(config.output_dir):
        with claim_run(config, "onpolicy", PATHS):
            inputs = _open(config)
            dtype = str(begun_dtype(config, inputs.device)).removeprefix("torch.")
            facts = {**_fingerprints(inputs), "compute_dtype": dtype}
            note_facts(config.output_dir, facts, inputs.device)
            if _is_done(inputs, config.rounds - 1):
                raise UsageError(
                    f"{config.output_dir} already holds this run, finished. Choose another "
                    "--output-dir, or add --force to replace it"
                )
        if inputs.prompts.skipped:
            note = (
                f"{inputs.prompts.skipped:,} documents have no prompt that fits; they are left out"
            )
            on_progress(Progress("onpolicy", note=note))
        lost = library_note(config.student, inputs.device.type, "auto")
        if lost and config.engine == "auto":
            on_progress(Progress("onpolicy", note=lost))
        return _run_rounds(inputs, on_progress)


def _run_rounds(inputs: _Inputs, on_progress: Listener) -> OnPolicyResult:
    config = inputs.config
    state = TrainingState()
    texts = tokens = 0
    for number in range(config.rounds):
        folder = inputs.folder(number)
        if number >= config.cold_rounds:
            _write(inputs, number, folder / "data", on_progress)
            gc.collect()
            _score(inputs, folder, on_progress)
            gc.collect()
            facts = open_dataset(folder / "data").manifest["splits"]["train"]
            texts, tokens = texts + facts["documents"], tokens + facts["targets"]
        state = _learn(inputs, number, on_progress)
        gc.collect()
    return OnPolicyResult(config.output_dir, config.rounds, state, texts, tokens)


def _open(config: OnPolicyConfig) -> _Inputs:
    """Open the inputs and check that they fit each other."""
    dataset = open_dataset(config.prompts)
    if is_endpoint(config.teacher):
        raise UsageError(
            f"{config.teacher} is an endpoint, which cannot score the tokens that the student "
            "wrote: give a model folder, a Hub name or a GGUF file"
        )
    student = open_model(config.student)
    tokenizer = load_tokenizer(config.student)
    require_tokenizer(dataset, tokenizer.fingerprint(), f"student {config.student}")
    require_context(
        config.max_seq_length,
        student.config.max_position_embeddings,
        f"student {config.student}",
    )
    _require_teacher(config, tokenizer)
    mix = None
    if config.mix_data is not None and config.mix_cache is not None:
        mix = open_dataset(config.mix_data)
        require_tokenizer(mix, tokenizer.fingerprint(), f"student {config.student}")
        Cache(config.mix_cache).require_dataset(mix.fingerprint, mix.folder)
    prompts = find_prompts(
        dataset, config.prompt_tokens, config.max_seq_length + 1 - config.max_new_tokens
    )
    return _Inputs(config, dataset, prompts, tokenizer, pick_device(config.device), mix)


def _require_teacher(config: OnPolicyConfig, tokenizer: Any) -> None:
    """Raise UsageError before the first round instead of after its texts."""
    teacher = load_tokenizer(open_model(config.teacher).path)
    if teacher.fingerprint() != tokenizer.fingerprint():
        raise UsageError(
            f"teacher {config.teacher} and student {config.student} have different tokenizers. A "
            "student also writes tokens that its tokenizer would not choose for the text, so the "
            "teacher cannot score them. Use `xinslm distill` with a cache"
        )


def _fingerprints(inputs: _Inputs) -> dict[str, Any]:
    """The inputs that determine the run besides its settings."""
    config = inputs.config
    student = open_model(config.student)
    fingerprints = {
        "student": student.fingerprint,
        "teacher": teacher_fingerprint(config.teacher),
        "prompts": inputs.dataset.fingerprint,
    }
    if config.mix_cache is not None:
        fingerprints["mix_cache"] = manifest_fingerprint(config.mix_cache)
    return {"parameters": student.config.num_parameters, "inputs": fingerprints}


def _steps(folder: Path) -> tuple[int, int] | None:
    """First step and number of steps of a round whose training has started."""
    if not (folder / ROUND).is_file():
        return None
    facts = read_json(folder / ROUND)
    return facts["first_step"], facts["steps"]


def _is_done(inputs: _Inputs, number: int) -> bool:
    """Whether the newest checkpoint is at or after the end of round `number`."""
    begun, last = _steps(inputs.folder(number)), last_checkpoint(inputs.config.output_dir)
    return begun is not None and last is not None and read_state(last).step >= sum(begun)


def _write(inputs: _Inputs, number: int, folder: Path, on_progress: Listener) -> None:
    """Generate the round's texts with the current student, unless they exist."""
    remove_partials(folder)
    if (folder / MANIFEST).is_file():
        return
    config, prompts = inputs.config, inputs.prompts
    student = last_checkpoint(config.output_dir) or config.student
    vocab_size = inputs.tokenizer.vocab_size
    chosen = prompts.take(indices_of_step(number, config.completions, len(prompts), config.seed))

    def tell(done: int, tokens: int) -> None:
        on_progress(
            Progress(f"round {number + 1}: write", done, len(chosen), "texts", {"tokens": tokens})
        )

    engine, open_decoder, context, bytes_per_token = _writer(inputs, student)
    limits = Limits(
        config.max_new_tokens,
        context,
        end_ids(inputs.tokenizer),
        config.generation_batch_size,
        bytes_per_token,
        top=min(config.support_top_k, vocab_size - TEACHERS - 2),
        name=f"student {student}",
    )
    first = number * config.completions
    written = generate_batch(
        open_decoder,
        chosen,
        range(first, first + len(chosen)),
        config.sampling(),
        limits,
        tell,
    )
    made_from = {
        "student": open_model(student).fingerprint,
        "prompts": inputs.dataset.fingerprint,
    }
    settings = {
        "round": number + 1,
        **{k: v for k, v in to_dict(config).items() if k not in ("loss", "mix_loss")},
        "engine": engine,
    }
    write_texts(folder, chosen, written, inputs.tokenizer, made_from, settings)


def _writer(inputs: _Inputs, student: Path) -> tuple[EngineName, OpenDecoder, int, int]:
    """What writes with a student: the engine's name, its decoders, the context, and the bytes of a
    token's keys and values.
    """
    config, vocab_size, device = inputs.config, inputs.tokenizer.vocab_size, inputs.device
    batch = open_batch(config.engine, student, vocab_size, device.type, "auto")
    if batch is not None:
        return "native", batch.open_decoder, batch.max_length, batch.cache_bytes_per_token
    model = load_model(student, begun_dtype(config, device)).to(device).requires_grad_(False)

    def open_decoder(rows: int, length: int) -> RowDecoder:
        return RowDecoder(model, rows, length, vocab_size)

    return "pytorch", open_decoder, model.config.max_position_embeddings, token_bytes(model)


def _score(inputs: _Inputs, folder: Path, on_progress: Listener) -> None:
    """Let the teacher score the texts, unless the cache exists; a stopped pass continues."""
    config, cache = inputs.config, folder / "cache"
    if (cache / MANIFEST).is_file():
        return
    score.run(
        CacheConfig(
            teacher=config.teacher,
            data_path=folder / "data",
            output_dir=cache,
            tail_sample_mass=0.0,
            temperature=config.loss.temperature,
            max_seq_length=config.max_seq_length,
            dtype=config.teacher_dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            seed=config.seed,
        ),
        on_progress,
    )


def _learn(inputs: _Inputs, number: int, on_progress: Listener) -> TrainingState:
    """Train on the round's texts and the mixed-in data, from the newest checkpoint."""
    config = inputs.config
    if _is_done(inputs, number):
        return read_state(config.output_dir / CHECKPOINTS / "last")
    sources = _sources(inputs, number)
    begun = _steps(inputs.folder(number))
    if begun is None:
        before = _steps(inputs.folder(number - 1)) if number else None
        begun = sum(before) if before else 0, _steps_of(config, sources, number)
        write_json(inputs.folder(number) / ROUND, {"first_step": begun[0], "steps": begun[1]})
    first, steps = begun
    if config.contrast and number >= config.cold_rounds:
        sources[0] = replace(sources[0], weight=_ramp(config, number, first, steps))
    seed = (config.seed + 0x9E3779B1 * (number + 1)) % (1 << 31)
    plan = RowSampler(sources, config.batch_size, steps, seed, first, balanced=config.contrast)
    model = load_model(config.student, gradient_checkpointing=config.gradient_checkpointing)
    model = model.to(inputs.device)
    model.compute_dtype = begun_dtype(config, inputs.device)
    held_out = validation_data(inputs.dataset, config.max_seq_length)
    validation = None if held_out is None else (held_out, None)
    objective = PackedObjective(model, config, plan, inputs.device, validation)

    def rate(step: int) -> float:
        """The schedule for all rounds, as if each had the steps of this one."""
        place, total = number * steps + step - first, config.rounds * steps
        warmup, decay = config.warmup_ratio, config.decay_ratio
        return learning_rate(place, total, config.learning_rate, warmup, decay)

    trainer = Trainer(objective, config, first + steps, rate)
    state = resume(trainer, read_tensors)
    recorder = RunRecorder(
        trainer,
        state,
        partial(write_model, model, inputs.tokenizer),
        on_progress,
        f"round {number + 1}: learn",
        with_kd=True,
        keep_best=False,
    )
    if state.step == 0 and held_out is not None:
        recorder.validation(trainer.validate(), state)
    return train(trainer, state, recorder)


def _sources(inputs: _Inputs, number: int) -> list[Source]:
    """The round's own texts, then the mixed-in data; off-policy rounds use only the latter."""
    config, result = inputs.config, []
    own, mixed = config.losses
    share = 0.5 if config.contrast else config.mix_share
    folder = inputs.folder(number)
    if number >= config.cold_rounds:
        rows = PackedDataset(open_dataset(folder / "data").split("train"), config.max_seq_length)
        entries = Cache(folder / "cache").split("train")
        assert entries is not None, "every dataset has a train split"
        result.append(
            Source(rows, CachedTargets(entries), own, 1.0 if inputs.mix is None else 1 - share)
        )
    if inputs.mix is not None and config.mix_cache is not None:
        entries = Cache(config.mix_cache).split("train")
        assert entries is not None, "every dataset has a train split"
        rows = PackedDataset(inputs.mix.split("train"), config.max_seq_length)
        result.append(Source(rows, CachedTargets(entries), mixed, share if result else 1.0))
    return result


def _steps_of(config: OnPolicyConfig, sources: list[Source], number: int) -> int:
    """Steps for `num_epochs` passes over a round's own texts; an off-policy round takes as many
    documents of the mixed-in data.
    """
    rows = sources[0].rows
    count = float(len(rows))
    if number < config.cold_rounds:
        count *= min(1.0, config.completions / (len(rows.split.documents) - 1))
    return max(1, math.ceil(config.num_epochs * count / (config.batch_size * sources[0].share)))


def _ramp(config: OnPolicyConfig, number: int, first: int, steps: int) -> Callable[[int], float]:
    """Weight of the student's own texts in the contrast, linear over the rounds that have such
    texts.
    """
    before, rounds = (
        (number - config.cold_rounds) * steps,
        (config.rounds - config.cold_rounds) * steps,
    )
    span = config.contrast_end - config.contrast_start

    def weight(step: int) -> float:
        return config.contrast_start + span * (before + step - first) / max(rounds - 1, 1)

    return weight
