"""The stage `synthesize`: a teacher answers prompts (sequence-level distillation, Kim and Rush,
arXiv:1606.07947).

    xinslm synthesize TEACHER --prompts prompts.jsonl --output-dir answers
    xinslm distill --data-path answers/data --cache answers/cache --output-dir student

The text goes into `text.jsonl`, its tokens into `data`, the teacher's distributions into `cache`: a
local teacher scores the text, an endpoint's log-probabilities come with its answers. Answers are
kept in a journal until the folder is complete; a stopped run continues after the last of them.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xinslm.cache.config import default_top_k
from xinslm.config import to_dict
from xinslm.device import pick_device
from xinslm.errors import UsageError, XinslmError
from xinslm.files import MANIFEST, sha256_json, write_manifest
from xinslm.folders import Plan, claim, locked
from xinslm.progress import Listener, Progress, ignore
from xinslm.rollouts.native_writer import NativeWriter, open_writer
from xinslm.rollouts.prompts import read_prompts
from xinslm.rollouts.synthesize_answers import answer_prompts
from xinslm.rollouts.synthesize_cache import DATA, cache_log_probs, score_answers
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.rollouts.synthesize_data import (
    Answer,
    split_answers,
    write_dataset,
    write_text_file,
)
from xinslm.teachers.base import Prompt
from xinslm.teachers.endpoint import EndpointTeacher, is_endpoint
from xinslm.teachers.open import TeacherOptions, open_teacher
from xinslm.tokenizer.load import load_tokenizer

KIND, VERSION = "synthesis", 1
PLAN, ANSWERS, TEXT = "unfinished.json", "answers.jsonl", "text.jsonl"
_PLACES = (
    "force",
    "output_dir",
    "prompts",
    "teacher",
    "endpoint",
    "keep_cache",
    "top_k",
    "tail_sample_mass",
    "cache_temperature",
    "max_seq_length",
    "tokenizer_path",
    "teacher_tokenizer_path",
    "document_end",
    "validation_fraction",
)
"""Settings that do not affect the answers."""


@dataclass(frozen=True)
class SynthesizeResult:
    """Result of `synthesize`."""

    folder: Path
    answers: int
    tokens: int
    unfinished: int
    refused: int
    empty: int
    data: bool
    cached: str
    """Content of the cache, or why there is none."""
    engine: str
    """What wrote the answers."""
    seconds: float

    def describe(self) -> str:
        """Lines for the terminal."""
        dropped = [
            f"{n:,} {what}" for n, what in ((self.refused, "refused"), (self.empty, "empty")) if n
        ]
        lines = [
            f"answers     {self.answers:,}, {self.unfinished:,} of them cut off at --max-new-tokens"
        ]
        if dropped:
            lines.append(f"dropped     {' and '.join(dropped)}")
        lines.append(f"written by  {self.engine}")
        lines.append(f"text        {self.folder / TEXT}")
        if self.data:
            lines.append(f"dataset     {self.folder / DATA}")
        lines.append(f"cache       {self.cached}")
        return "\n".join([*lines, f"time        {self.seconds:.0f} s"])


def run(
    config: SynthesizeConfig, on_progress: Listener = ignore, api_key: str | None = None
) -> SynthesizeResult:
    """Write answers to all prompts, their dataset and their cache; `api_key` is for endpoints.

    UsageError for prompts that the teacher cannot take, and for an output folder that holds
    something else; XinslmError if a server fails permanently or all answers are empty.
    """
    config.check()
    if config.repetition_penalty != 1 and is_endpoint(config.teacher):
        raise UsageError(
            "repetition_penalty is for local teachers: endpoints have no common name for it"
        )
    prompts = read_prompts(config.prompts)
    options = TeacherOptions(
        dtype=config.dtype,
        device=pick_device(config.device),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        tokenizer=config.teacher_tokenizer_path,
        endpoint=config.endpoint,
        top=default_top_k(config.top_k, 0),
        api_key=api_key,
    )
    teacher = _open(config, options, on_progress)
    if not isinstance(teacher, EndpointTeacher):
        config = _within(config, teacher.max_length, on_progress)
    plan = {
        "settings": {key: value for key, value in to_dict(config).items() if key not in _PLACES},
        "inputs": {"prompts": sha256_json(prompts), "teacher": teacher.fingerprint},
    }
    no_log_probs = _try(teacher, prompts, config) if isinstance(teacher, EndpointTeacher) else None
    reads = (config.teacher, config.prompts, config.tokenizer_path, config.teacher_tokenizer_path)
    begin = Plan(PLAN, plan, "synthesis", KIND, tuple(reads))
    with locked(config.output_dir):
        with claim(config.output_dir, begin, config.force):
            pass
        began = time.monotonic()
        written, refused, empty = answer_prompts(
            config, teacher, prompts, config.output_dir / ANSWERS, on_progress
        )
        if not written:
            raise XinslmError(
                f"teacher {config.teacher} answered none of {len(prompts):,} prompts: {refused:,} "
                f"refused, {empty:,} empty. Look at the prompts; what came is in "
                f"{config.output_dir / ANSWERS}"
            )
        tokenizer, engine = _tokenizer(config, teacher), _engine(teacher)
        endpoint = teacher if isinstance(teacher, EndpointTeacher) else None
        del teacher  # its memory is free when the cache stage opens it again
        cached = _keep(config, written, tokenizer, endpoint, no_log_probs, on_progress)
        _finish(config, plan, engine)
    return SynthesizeResult(
        config.output_dir,
        len(written),
        sum(len(answer.written.token_bytes) for answer in written),
        sum(not answer.written.finished for answer in written),
        refused,
        empty,
        tokenizer is not None,
        cached,
        engine,
        time.monotonic() - began,
    )


def _keep(
    config: SynthesizeConfig,
    written: list[Answer],
    tokenizer: Any,
    endpoint: EndpointTeacher | None,
    no_log_probs: str | None,
    on_progress: Listener,
) -> str:
    """Write the answers' text, dataset and cache into the claimed folder; return what the cache
    holds. `no_log_probs` says why an endpoint gives none.
    """
    folder = config.output_dir
    write_text_file(folder / TEXT, written)
    if tokenizer is None:
        return (
            "none, because the endpoint's tokens are unknown: give its model's tokenizer with "
            "--teacher-tokenizer-path"
        )
    splits = split_answers(written, config.validation_fraction, config.seed)
    if not (folder / DATA / MANIFEST).is_file():
        write_dataset(folder / DATA, splits, tokenizer, config.document_end, to_dict(config))
    if not config.keep_cache:
        return "none was asked for"
    if endpoint is None:
        return score_answers(config, on_progress)
    return no_log_probs or cache_log_probs(config, endpoint, tokenizer, splits, on_progress)


def _open(config: SynthesizeConfig, options: TeacherOptions, on_progress: Listener) -> Any:
    """The teacher: an endpoint, or what writes on this machine."""
    name, engine = config.teacher, config.engine
    if is_endpoint(name):
        if engine != "auto":
            raise UsageError(f"--engine {engine} is for local teachers, and {name} is an endpoint")
        return open_teacher(name, options)
    if config.trust_remote_code:
        if engine == "native":
            raise UsageError("--engine native runs no code of --trust-remote-code: leave one out")
        engine = "pytorch"
    writer = open_writer(
        engine,
        name,
        torch.device(options.device).type,
        options.dtype,
        options.revision,
        options.tokenizer,
        lambda note: on_progress(Progress("synthesize", note=note)),
    )
    return writer or open_teacher(name, options)


def _engine(teacher: Any) -> str:
    if isinstance(teacher, NativeWriter):
        kernels = teacher.batch.context.kernels
        return f"the native engine ({kernels}), activations in 8 bits"
    return "the endpoint" if isinstance(teacher, EndpointTeacher) else "PyTorch"


def _within(config: SynthesizeConfig, context: int, on_progress: Listener) -> SynthesizeConfig:
    """Shorten lengths to the teacher's context, with a note."""
    new, rows = min(config.max_new_tokens, context), config.max_seq_length
    longer = [f"--max-new-tokens {config.max_new_tokens:,}"] if config.max_new_tokens > new else []
    if config.keep_cache and rows > context:
        longer.append(f"--max-seq-length {rows:,}")
        rows = context
    if longer:
        note = (
            f"teacher {config.teacher} has a context of {context:,} tokens, prompt included: "
            f"{' and '.join(longer)} is shortened to it"
        )
        on_progress(Progress("synthesize", note=note))
    return replace(config, max_new_tokens=new, max_seq_length=rows)


def _try(teacher: EndpointTeacher, prompts: list[Prompt], config: SynthesizeConfig) -> str | None:
    """Test whether the server returns log-probabilities for each kind of prompt; return why there
    is no cache, or None.
    """
    if not config.keep_cache or teacher.tokenizer is None:
        teacher.rivals = 0
        return None
    for kind in (str, list):
        sample = next((prompt for prompt in prompts if isinstance(prompt, kind)), None)
        if sample is not None and (reason := teacher.gives_log_probs(sample)) is not None:
            return f"none, because {teacher.name} does not say how likely its tokens are ({reason})"
    return None


def _tokenizer(config: SynthesizeConfig, teacher: Any) -> Any:
    """The dataset's tokenizer; None if an endpoint's is unknown."""
    return (
        teacher.tokenizer
        if config.tokenizer_path is None
        else load_tokenizer(config.tokenizer_path)
    )


def _finish(config: SynthesizeConfig, plan: dict[str, Any], engine: str) -> None:
    folder = config.output_dir
    write_manifest(
        folder,
        KIND,
        VERSION,
        to_dict(config),
        plan["inputs"],
        skip=(PLAN, ANSWERS),
        written_by=engine,
    )
    (folder / ANSWERS).unlink(missing_ok=True)
    (folder / PLAN).unlink()
