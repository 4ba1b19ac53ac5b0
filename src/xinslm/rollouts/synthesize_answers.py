"""Generate the answers of `xinslm synthesize` with a journal, so a stopped run continues."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xinslm.cache.journal import Journal
from xinslm.errors import UsageError, XinslmError
from xinslm.progress import Listener, Progress
from xinslm.rollouts.synthesize_config import SynthesizeConfig
from xinslm.rollouts.synthesize_data import Answer
from xinslm.sampling import Sampling
from xinslm.teachers.base import Generation, Prompt
from xinslm.teachers.client import in_flight
from xinslm.teachers.endpoint import EndpointTeacher
from xinslm.teachers.generate import MOST_ROWS, Tell

GROUP = 2
"""Answers that are written and kept together, as a multiple of the texts written at once."""

Place = tuple[int, int]
"""Indices of a prompt and of an answer to it."""


def answer_prompts(
    config: SynthesizeConfig, teacher: Any, prompts: list[Prompt], path: Path, on_progress: Listener
) -> tuple[list[Answer], int, int]:
    """Answer all prompts, with the journal at `path`; return the answers in the order of their
    prompts, and how many were refused and how many were empty.
    """
    sampling = Sampling(
        temperature=config.temperature,
        top_k=0,
        top_p=config.top_p,
        min_p=0.0,
        repetition_penalty=config.repetition_penalty,
        seed=config.seed,
    )
    places = [
        (prompt, sample) for prompt in range(len(prompts)) for sample in range(config.samples)
    ]
    done: dict[Place, Generation | None] = {}
    with Journal(path) as journal:
        for entry in journal:
            done[entry["prompt"], entry["sample"]] = _from_entry(entry)

        def tell(texts: int = 0, tokens: int = 0) -> None:
            on_progress(Progress("synthesize", len(done) + texts, len(places), "answers"))

        tell()
        rest = config, teacher, prompts, places, set(done), sampling
        remote = isinstance(teacher, EndpointTeacher)
        for batch in _remote(*rest) if remote else _local(*rest, tell):
            journal.append(*(_to_entry(place, written) for place, written in batch.items()))
            done.update(batch)
            tell()
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
    tell: Tell,
) -> Iterator[dict[Place, Generation | None]]:
    """Generate with a local teacher, group by group; groups do not depend on what is done.

    In a group, a text that waits takes the row of one that ended.
    """
    order = sorted(places, key=lambda place: (_size(prompts[place[0]]), place))
    size = GROUP * (config.batch_size or MOST_ROWS)
    for first in range(0, len(order), size):
        group = order[first : first + size]
        if done.issuperset(group):
            continue
        keys = [prompt * config.samples + sample for prompt, sample in group]
        written = teacher.generate(
            [prompts[prompt] for prompt, _ in group],
            keys,
            sampling,
            config.max_new_tokens,
            config.batch_size,
            tell,
        )
        yield dict(zip(group, written, strict=True))


def _remote(
    config: SynthesizeConfig,
    teacher: EndpointTeacher,
    prompts: list[Prompt],
    places: list[Place],
    done: set[Place],
    sampling: Sampling,
) -> Iterator[dict[Place, Generation | None]]:
    """Generate with an endpoint; answers arrive in any order."""

    def ask(place: Place) -> Generation | None:
        key = place[0] * config.samples + place[1]
        try:
            return teacher.write(prompts[place[0]], key, sampling, config.max_new_tokens)
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
    """Make a line of the journal; bytes are written as Latin-1."""
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
