"""The demo: every command of the tool, one after another, on text that it writes itself.

Each line that begins with `$` is a command that can be typed as it stands; the demo runs it through
the same entry point. The settings make it fit two cores and a few minutes; nothing else is special.
"""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xinslm.demo.config import DemoConfig
from xinslm.errors import XinslmError
from xinslm.files import read_json
from xinslm.folders import refuse_existing
from xinslm.machine import is_shared

TEACHER = "--hidden-size 128 --num-layers 6 --num-heads 4 --num-kv-heads 2 --intermediate-size 384"
STUDENT = "--hidden-size 64 --num-layers 4 --num-heads 2 --num-kv-heads 1 --intermediate-size 192"
PROMPTS = ("One morning", "Yesterday, a little")


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and how long it took."""

    folder: Path
    rows: tuple[dict[str, float | int | str], ...]
    seconds: float

    def describe(self) -> str:
        """The table, and where to look."""
        columns = ("model", "parameters", "on disk", "bits/byte", "perplexity", "tokens/s")
        cells = [columns] + [
            (
                str(row["name"]),
                f"{row['parameters']:,}",
                f"{float(row['file_bytes']) / 1e6:.2f} MB",
                f"{row['bits_per_byte']:.4f}",
                f"{row['perplexity']:.3f}",
                "shared" if is_shared(row["other_load"]) else f"{row['tokens_per_second']:,.0f}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        ]
        student = self.folder / "student"
        return "\n".join(
            [
                "",
                *lines,
                "",
                f"report      {student / 'report.html'}",
                f"GGUF        {self.folder / 'student.gguf'} (for llama.cpp, Ollama, LM Studio)",
                f"talk to it  xinslm chat {self.folder / 'student-4bit'}",
                f"time        {self.seconds:.0f} s",
            ]
        )


def commands(config: DemoConfig) -> list[str]:
    """The command lines, in order, without the leading `xinslm`."""
    d = shlex.quote(str(config.output_dir))
    train = f"--max-seq-length 256 --batch-size 8 --learning-rate 4e-3 --seed {config.seed}"
    student = f"{train} {STUDENT} --max-steps {config.student_steps}"
    evaluated = f"--data-path {d}/data --run {d}/student"
    sample = f"--max-new-tokens 80 --seed {config.seed} --run {d}/student"
    lines = [
        f"tokenizer train --data-path {d}/text --output-dir {d}/tokenizer --vocab-size "
        f"{config.vocab_size}",
        f"prepare --data-path {d}/text --tokenizer-path {d}/tokenizer --output-dir {d}/data "
        "--show 1",
        f"pretrain --data-path {d}/data --output-dir {d}/teacher {train} {TEACHER} --max-steps "
        f"{config.teacher_steps}",
        f"cache {d}/teacher --data-path {d}/data --output-dir {d}/cache --max-seq-length 256",
        f"distill --data-path {d}/data --cache {d}/cache --output-dir {d}/student {student}",
        f"pretrain --data-path {d}/data --output-dir {d}/undistilled {student}",
        f"quantize {d}/student --data-path {d}/data --output-dir {d}/student-4bit --run "
        f"{d}/student "
        f"--num-calibration-samples 64",
        f"export gguf {d}/student-4bit --output-path {d}/student.gguf --run {d}/student",
        f"evaluate {d}/teacher {evaluated} --name teacher",
        f"evaluate {d}/student {evaluated} --name student",
        f"evaluate {d}/undistilled {evaluated} --name 'student without teacher'",
        f"evaluate {d}/student-4bit {evaluated} --name 'student, 4-bit'",
        *(
            f"generate {d}/{folder} --prompt {shlex.quote(prompt)} {sample} --name '{name}: "
            f"{prompt}'"
            for prompt in PROMPTS
            for name, folder in (("teacher", "teacher"), ("student, 4-bit", "student-4bit"))
        ),
        f"report {d}/student --compare {d}/undistilled {d}/teacher",
    ]
    return lines


def run(
    config: DemoConfig, command: Callable[[Sequence[str]], int], say: Callable[[str], None]
) -> DemoResult:
    """Write the text, run the commands through `command`, stop at the first that fails."""
    from xinslm.demo.texts import write_sample

    config.check()
    began = time.monotonic()
    _clear(config)
    say(
        f"writing {config.megabytes:g} MB of stories, facts and instructions into "
        f"{config.output_dir / 'text'}"
    )
    write_sample(config.output_dir / "text", int(config.megabytes * 1e6), config.seed)
    for line in commands(config):
        say(f"\n$ xinslm {line}")
        code = command(shlex.split(line))
        if code == 130:
            raise KeyboardInterrupt
        if code != 0:
            raise XinslmError(f"the demo stopped at: xinslm {line}")
    rows = read_json(config.output_dir / "student" / "evaluation.json")["rows"]
    return DemoResult(config.output_dir, tuple(rows), time.monotonic() - began)


def _clear(config: DemoConfig) -> None:
    """Remove what an earlier demo left, and only that."""
    import shutil

    refuse_existing(config.output_dir, config.force)
    if config.output_dir.is_dir() and any(config.output_dir.iterdir()):
        if not (config.output_dir / "text" / "stories.jsonl").is_file():
            raise XinslmError(
                f"{config.output_dir} holds something that no demo made; choose "
                "another --output-dir"
            )
        shutil.rmtree(config.output_dir)
