"""Settings of `xinslm benchmark`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from xinslm.hints import POSITIONAL, Alias
from xinslm.ranges import POSITIVE, SEED, Activations, Device, Range, Settings, range_errors

TaskDtype = Literal["float32", "float64", "auto", "bfloat16"]
"""auto: float32, with the factors of matrix products in bfloat16 on CPUs with AMX."""
INSTRUCTIONS, CODE, OWN_TASKS = "ifeval", "humaneval", ".jsonl"

_RANGES = {
    "max_minutes": POSITIVE,
    "max_new_tokens": Range(1),
    "max_seq_length": Range(2),
    "batch_tokens": Range(1),
    "seed": SEED,
}


@dataclass(frozen=True)
class BenchmarkConfig(Settings):
    """Score a model on benchmark tasks, next to another one, with honest intervals."""

    model: Annotated[Path, POSITIONAL]
    """Any causal model: a model, run or quantized folder, a GGUF file, or a Hub name."""
    tasks: tuple[str, ...] = ("hellaswag", "truthfulqa_mc1", "truthfulqa_mc2", "mmlu:5")
    """Tasks of lm-evaluation-harness by its names (hellaswag, truthfulqa_mc2, ...), with the number
    of examples in the prompt after a colon (mmlu:5), or as a YAML file; humaneval, ifeval; a .jsonl
    file with instructions of your own (docs/tasks.md).
    """
    data: Path | None = None
    """Folder with the tasks' data, such as hellaswag_val.jsonl.gz; without it, from the Hub."""
    against: Path | None = None
    """Model to compare with on the same items, such as the teacher."""
    max_minutes: float | None = None
    """Score a random, stratified part of the items that takes about this long, and give the
    interval that holds the full run's value.
    """
    apply_chat_template: bool = False
    """Write the prompts of harness tasks as chats; ifeval and instructions of your own always are,
    if the model has a template.
    """
    allow_code_execution: bool = False
    """Run the programs that the model writes for humaneval: limited, but not a security boundary.
    """
    judge: str | None = None
    """URL of an OpenAI-compatible endpoint that grades the items of your own that ask for it."""
    judge_model: str | None = None
    """Model of the judge's endpoint, if it serves several."""
    speed: bool = False
    """Also measure speed and memory, in processes of their own."""
    max_new_tokens: int = 512
    """Longest answer in humaneval, ifeval and instructions of your own."""
    max_seq_length: int | None = None
    """Longest input in tokens; by default the model's context."""
    batch_tokens: int = 512
    """Most tokens in one forward pass; fewer need less memory."""
    device: Device = "auto"
    """Where to compute; auto takes cuda, then mps, then cpu."""
    dtype: TaskDtype = "float32"
    """Type to compute in; float64 gives the values of the harness to 1e-9."""
    activations: Activations = "float"
    """Inputs of MODEL's linear layers: as they are, or rounded to int8 blocks, as llama.cpp does to
    those of 4-bit and 8-bit weights. A slow reference in PyTorch; the model needs such weights.
    """
    seed: int = 0
    """Of the order of the items with --max-minutes, and of the bootstrap."""
    output_path: Annotated[Path | None, Alias("-o")] = None
    """JSON file to write: all results, with every item of every task. Until then FILE.partial keeps
    the answers, and the same command goes on from them after a stop.
    """
    run: Path | None = None
    """Run folder whose benchmark.json receives the results, for `xinslm report`."""
    name: str | None = None
    """What the row is called in the report; by default the model's name."""
    force: bool = False
    """Replace the output file."""

    @property
    def journal_path(self) -> Path | None:
        """Where answers are kept until the result is written, so that a stopped run goes on; not
        with a time limit, whose items depend on the speed.
        """
        if self.max_minutes is not None or not self.tasks:
            return None
        if self.output_path is not None:
            return self.output_path.with_name(f"{self.output_path.name}.partial")
        return None if self.run is None else self.run / "benchmark.partial"

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _RANGES)
        if not self.tasks and not self.speed:
            wrong.append("there is nothing to measure: name --tasks, or pass --speed")
        if self.speed and self.activations == "int8":
            wrong.append("speed is measured with float activations; leave --activations int8 out")
        if len(set(self.tasks)) < len(self.tasks):
            wrong.append("tasks has a name twice")
        if CODE in self.tasks and not self.allow_code_execution:
            wrong.append(
                "humaneval runs programs that the model writes; pass --allow-code-execution to "
                "run them on this machine, with limits that are not a security boundary"
            )
        if self.judge_model is not None and self.judge is None:
            wrong.append("judge_model needs --judge, the URL of its endpoint")
        return wrong
