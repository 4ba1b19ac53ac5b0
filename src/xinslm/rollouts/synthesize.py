"""The stage `synthesize`: a teacher answers prompts (sequence-level distillation, Kim and Rush,
arXiv:1606.07947).

    xinslm synthesize TEACHER --prompts prompts.jsonl --output-dir answers
    xinslm distill --data-path answers/data --cache answers/cache --output-dir student

The text goes into `text.jsonl`, its tokens into `data`, the teacher's distributions along them into
`cache`, so that the token-level loss comes free: from the teacher itself where it runs here, from
what an endpoint said beside its text otherwise. Answers stand in a journal until all is whole; a
run that was stopped continues behind the last of them.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xinslm.cache import score
from xinslm.cache.config import CacheConfig, default_top_k
from xinslm.cache.endpoint_scorer import endpoint_format
from xinslm.cache.entries import Cache
from xinslm.cache.journal import Journal
from xinslm.cache.write import cache_plan, write_cache
from xinslm.config import to_dict
from xinslm.data.dataset import open_dataset
from xinslm.device import pick_device
from xinslm.errors import UsageError, XinslmError
from xinslm.files import MANIFEST, sha256_json, write_manifest
from xinslm.folders import Plan, claim, locked
from xinslm.progress import Listener, Progress, ignore
from xinslm.rollouts.prompts import read_prompts
from xinslm.rollouts.synthesize_cache import WrittenScorer
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.rollouts.synthesize_data import (
    Answer,
    split_answers,
    write_dataset,
    write_text_file,
)
from xinslm.teachers.base import Generation, Prompt, Sampling
from xinslm.teachers.client import in_flight
from xinslm.teachers.endpoint import EndpointTeacher
from xinslm.teachers.open import open_teacher
from xinslm.tokenizer.load import load_tokenizer

KIND, VERSION = "synthesis", 1
PLAN, ANSWERS, TEXT, DATA, CACHE = "unfinished.json", "answers.jsonl", "text.jsonl", "data", "cache"
_PLACES = (
    "force",
    "output_dir",
    "prompts",
    "teacher",
    "endpoint",
    "keep_cache",
    "top_k",
    "tail_samples",
    "cache_temperature",
    "max_seq_length",
    "tokenizer_path",
    "teacher_tokenizer_path",
    "document_end",
    "validation_fraction",
)
"""Settings that no answer depends on."""
Place = tuple[int, int]
"""Numbers of a prompt and of an answer to it."""


@dataclass(frozen=True)
class SynthesizeResult:
    """What `synthesize` made."""

    folder: Path
    answers: int
    tokens: int
    unfinished: int
    refused: int
    empty: int
    data: bool
    cached: str
    """What the cache holds, or why there is none."""
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
        lines.append(f"text        {self.folder / TEXT}")
        if self.data:
            lines.append(f"dataset     {self.folder / DATA}")
        lines.append(f"cache       {self.cached}")
        return "\n".join([*lines, f"time        {self.seconds:.0f} s"])


def run(
    config: SynthesizeConfig, on_progress: Listener = ignore, api_key: str | None = None
) -> SynthesizeResult:
    """Write answers to all prompts, their dataset and their cache; `api_key` is for a teacher
    behind a URL.

    UsageError for prompts that the teacher cannot take, and for an output folder that holds
    something else; XinslmError where a server fails for good or all answers are empty.
    """
    config.check()
    prompts = read_prompts(config.prompts)
    teacher: Any = open_teacher(
        config.teacher,
        config.dtype,
        pick_device(config.device),
        config.revision,
        config.trust_remote_code,
        config.teacher_tokenizer_path,
        config.endpoint,
        default_top_k(config.top_k, 0),
        api_key,
    )
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
        return _synthesize(config, teacher, prompts, plan, no_log_probs, on_progress)


def _synthesize(
    config: SynthesizeConfig,
    teacher: Any,
    prompts: list[Prompt],
    plan: dict[str, Any],
    no_log_probs: str | None,
    on_progress: Listener,
) -> SynthesizeResult:
    """Write the answers, their dataset and their cache into the claimed folder; `silent` says why
    an endpoint gives no cache.
    """
    began = time.monotonic()
    folder = config.output_dir
    written, refused, empty = _answer(config, teacher, prompts, folder / ANSWERS, on_progress)
    if not written:
        raise XinslmError(
            f"teacher {config.teacher} answered none of {len(prompts):,} prompts: {refused:,} "
            f"refused, {empty:,} "
            f"empty. Look at the prompts; what came is in {folder / ANSWERS}"
        )
    write_text_file(folder / TEXT, written)
    tokenizer = _tokenizer(config, teacher)
    splits = split_answers(written, config.validation_fraction, config.seed)
    cached = (
        "none, for the endpoint's tokens are not known: give its model's tokenizer with "
        "--teacher-tokenizer-path"
    )
    if tokenizer is not None:
        if not (folder / DATA / MANIFEST).is_file():
            write_dataset(folder / DATA, splits, tokenizer, config.document_end, to_dict(config))
        if not config.keep_cache:
            cached = "none was asked for"
        elif isinstance(teacher, EndpointTeacher):
            cached = no_log_probs or _cache_written(config, teacher, tokenizer, splits, on_progress)
        else:
            teacher = None  # the cache stage opens it again: two in memory are one too many
            cached = _cache_scored(config, on_progress)
    _finish(config, plan)
    tokens = sum(len(answer.written.token_bytes) for answer in written)
    unfinished = sum(not answer.written.finished for answer in written)
    return SynthesizeResult(
        folder,
        len(written),
        tokens,
        unfinished,
        refused,
        empty,
        tokenizer is not None,
        cached,
        time.monotonic() - began,
    )


def _within(config: SynthesizeConfig, context: int, on_progress: Listener) -> SynthesizeConfig:
    """The settings with lengths that a teacher's context allows; what is shortened is noted."""
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
    """None where the server says how likely its tokens are, after prompts of each kind; else why
    there is no cache.
    """
    if not config.keep_cache or teacher.tokenizer is None:
        teacher.rivals = 0
        return None
    for kind in (str, list):
        sample = next((prompt for prompt in prompts if isinstance(prompt, kind)), None)
        if sample is not None and (reason := teacher.gives_log_probs(sample)) is not None:
            return f"none, for {teacher.name} does not say how likely its tokens are ({reason})"
    return None


def _answer(
    config: SynthesizeConfig, teacher: Any, prompts: list[Prompt], path: Path, on_progress: Listener
) -> tuple[list[Answer], int, int]:
    """All answers in the order of their prompts, and how many were refused and empty."""
    sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens, config.seed)
    places = [
        (prompt, sample) for prompt in range(len(prompts)) for sample in range(config.samples)
    ]
    done: dict[Place, Generation | None] = {}
    with Journal(path) as journal:
        for entry in journal:
            done[entry["prompt"], entry["sample"]] = _from_entry(entry)
        work = _remote if isinstance(teacher, EndpointTeacher) else _local
        on_progress(Progress("synthesize", len(done), len(places), "answers"))
        for batch in work(config, teacher, prompts, places, set(done), sampling):
            journal.append(*(_to_entry(place, written) for place, written in batch.items()))
            done.update(batch)
            on_progress(Progress("synthesize", len(done), len(places), "answers"))
    answers = [(prompts[place[0]], done[place]) for place in places]
    written = [
        Answer(prompt, answer)
        for prompt, answer in answers
        if answer is not None and answer.text.strip()
    ]
    refused = sum(answer is None for _, answer in answers)
    if len(written) < len(answers):
        note = (
            f"{refused:,} answers refused, {len(answers) - refused - len(written):,} empty: they "
            "are left out"
        )
        on_progress(Progress("synthesize", note=note))
    return written, refused, len(answers) - refused - len(written)


def _local(
    config: SynthesizeConfig,
    teacher: Any,
    prompts: list[Prompt],
    places: list[Place],
    done: set[Place],
    sampling: Sampling,
) -> Iterator[dict[Place, Generation | None]]:
    """Answers of a teacher here, batch by batch; which share a batch does not depend on what is
    done.
    """
    order = sorted(places, key=lambda place: (_size(prompts[place[0]]), place))
    for first in range(0, len(order), config.batch_size):
        batch = order[first : first + config.batch_size]
        if not done.issuperset(batch):
            keys = [prompt * config.samples + sample for prompt, sample in batch]
            written = teacher.generate([prompts[prompt] for prompt, _ in batch], keys, sampling)
            yield dict(zip(batch, written, strict=True))


def _remote(
    config: SynthesizeConfig,
    teacher: EndpointTeacher,
    prompts: list[Prompt],
    places: list[Place],
    done: set[Place],
    sampling: Sampling,
) -> Iterator[dict[Place, Generation | None]]:
    """Answers of an endpoint, as they come."""

    def ask(place: Place) -> Generation | None:
        try:
            return teacher.write(prompts[place[0]], place[0] * config.samples + place[1], sampling)
        except XinslmError as error:
            kind = UsageError if isinstance(error, UsageError) else XinslmError
            raise kind(f"prompt {place[0] + 1:,}: {error}") from None

    for place, written in in_flight(
        ask, [place for place in places if place not in done], config.endpoint.concurrency
    ):
        yield {place: written}


def _size(prompt: Prompt) -> int:
    return (
        len(prompt)
        if isinstance(prompt, str)
        else sum(len(message["content"]) for message in prompt)
    )


def _to_entry(place: Place, written: Generation | None) -> dict[str, Any]:
    """A line of the journal; bytes are spelled in Latin-1."""
    entry: dict[str, Any] = {"prompt": place[0], "sample": place[1], "refused": written is None}
    if written is not None:
        entry |= {
            "text": written.text,
            "finished": written.finished,
            "log_probs": written.log_probs,
        }
        entry["tokens"] = [data.decode("latin-1") for data in written.token_bytes]
        entry["top"] = [
            [(data.decode("latin-1"), value) for data, value in top] for top in written.top
        ]
    return entry


def _from_entry(entry: dict[str, Any]) -> Generation | None:
    if entry["refused"]:
        return None
    top = [[(data.encode("latin-1"), value) for data, value in row] for row in entry["top"]]
    tokens = [data.encode("latin-1") for data in entry["tokens"]]
    return Generation(entry["text"], tokens, entry["log_probs"], top, entry["finished"])


def _tokenizer(config: SynthesizeConfig, teacher: Any) -> Any:
    """The dataset's tokenizer; None where nothing is known of an endpoint's."""
    return (
        teacher.tokenizer
        if config.tokenizer_path is None
        else load_tokenizer(config.tokenizer_path)
    )


def _cache_config(config: SynthesizeConfig) -> CacheConfig:
    return CacheConfig(
        teacher=config.teacher,
        data_path=config.output_dir / DATA,
        output_dir=config.output_dir / CACHE,
        top_k=config.top_k,
        tail_samples=config.tail_samples,
        temperature=config.cache_temperature,
        max_seq_length=config.max_seq_length,
        dtype=config.dtype,
        device=config.device,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        teacher_tokenizer_path=config.teacher_tokenizer_path,
        endpoint=config.endpoint,
        seed=config.seed,
    )


def _cache_scored(config: SynthesizeConfig, on_progress: Listener) -> str:
    """Let the teacher score the dataset of its answers, exactly."""
    if not (config.output_dir / CACHE / MANIFEST).is_file():
        score.run(_cache_config(config), on_progress)
    cache = Cache(config.output_dir / CACHE)
    return (
        f"{config.output_dir / CACHE}, scored by the teacher; {cache.format.dtype.itemsize} bytes "
        "a position"
    )


def _cache_written(
    config: SynthesizeConfig,
    teacher: EndpointTeacher,
    tokenizer: Any,
    splits: dict[str, list[Answer]],
    on_progress: Listener,
) -> str:
    """Make the cache of what the endpoint said beside its answers, where its tokens are the
    dataset's.
    """
    if teacher.tokenizer is None or tokenizer.fingerprint() != teacher.tokenizer.fingerprint():
        return (
            "none, for the dataset's tokens are not the endpoint's: leave --tokenizer-path "
            "out, or cache the "
            "dataset from the model's files with `xinslm cache`"
        )
    folder = config.output_dir / CACHE
    dataset = open_dataset(config.output_dir / DATA)
    fmt = endpoint_format(tokenizer.vocab_size, default_top_k(config.top_k, 0))
    if not (folder / MANIFEST).is_file():
        scorer = WrittenScorer(splits, tokenizer, fmt)
        made = _cache_config(config)
        plan = cache_plan(made, dataset, teacher, fmt, scorer)
        write_cache(made, dataset, plan, scorer, on_progress)
    cache = Cache(folder)
    valid = sum(
        int((entries["flags"] & 1).sum())
        for name in cache.manifest["shards"]
        if (split := cache.split(name)) is not None
        for entries in split.maps
    )
    targets = sum(split["targets"] for split in dataset.manifest["splits"].values())
    return (
        f"{folder}, from the log-probabilities that came with the text: {valid:,} of {targets:,} "
        "target tokens have "
        f"them; the others are learnt from the text alone"
    )


def _finish(config: SynthesizeConfig, plan: dict[str, Any]) -> None:
    folder = config.output_dir
    write_manifest(folder, KIND, VERSION, to_dict(config), plan["inputs"], skip=(PLAN, ANSWERS))
    (folder / ANSWERS).unlink(missing_ok=True)
    (folder / PLAN).unlink()
