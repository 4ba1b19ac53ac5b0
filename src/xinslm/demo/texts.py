"""The demo's built-in data: endless small stories and instructions, the same for the same seed.

A grammar of plots makes texts whose surprises are real choices (who, where, what, how many) and
whose rest follows from them, so that a model of a few million parameters learns much in minutes and
cannot learn them by heart.

    for text in stories(1_000_000, seed=0): ...
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from xinslm.demo import adventures, everyday, school
from xinslm.demo.instructions import instruction
from xinslm.demo.scene import Scene
from xinslm.files import new_file

PLOTS: tuple[Callable[[Scene], list[str]], ...] = (
    adventures.lost_and_found,
    adventures.race,
    adventures.rescue,
    adventures.trade,
    adventures.key_and_chest,
    adventures.far_land,
    adventures.night_sound,
    adventures.picnic,
    adventures.new_pet,
    everyday.sharing,
    everyday.baking,
    everyday.garden,
    everyday.broken,
    everyday.birthday,
    everyday.brave,
    everyday.shopping,
    school.lesson,
    school.towers,
    school.chores,
)


def story(rng: random.Random) -> str:
    """Tell one story, its paragraphs divided by blank lines."""
    scene = Scene(rng)
    return "\n\n".join(scene.pick(PLOTS)(scene))


def stories(num_bytes: int, seed: int = 0) -> Iterator[str]:
    """Tell stories until they have `num_bytes` bytes of UTF-8 or a little more."""
    rng = random.Random(f"stories {seed}")
    written = 0
    while written < num_bytes:
        text = story(rng)
        written += len(text.encode())
        yield text


def instructions(num: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Give `num` different exercises, {"prompt", "response"}."""
    rng = random.Random(f"instructions {seed}")
    seen: set[tuple[str, str]] = set()
    while len(seen) < num:
        pair = instruction(rng)
        if pair not in seen:
            seen.add(pair)
            yield {"prompt": pair[0], "response": pair[1]}


def write_sample(folder: Path, num_bytes: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `stories.jsonl` (about `num_bytes` of text) and `instructions.jsonl` (one for 1,000
    bytes of it).
    """
    paths = folder / "stories.jsonl", folder / "instructions.jsonl"
    _write(paths[0], ({"text": text} for text in stories(num_bytes, seed)))
    _write(paths[1], instructions(num_bytes // 1000, seed))
    return paths


def _write(path: Path, records: Iterable[dict[str, str]]) -> None:
    with new_file(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
