"""The commands: a name, a sentence, where its configuration and its function live.

Both the command line and `xinslm.run` read this table. Nothing is imported until used.
"""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Command:
    """One command of the tool; `config` and `run` are 'module:name' inside the package."""

    summary: str
    config: str
    run: str
    present: str = ""
    """How the result reaches the terminal where printing `result.describe()` is not all; a function
    of `cli.present`.
    """

    def load(self, what: str) -> Any:
        """Import the configuration class or the function."""
        module, _, name = getattr(self, what).partition(":")
        return getattr(importlib.import_module(f"xinslm.{module}"), name)


COMMANDS = {
    "demo": Command(
        "the whole pipeline on built-in data, in a few minutes",
        "demo.config:DemoConfig",
        "demo.run:run",
        "play_demo",
    ),
    "tokenizer train": Command(
        "learn a byte-level BPE from text, or cut one out of a teacher's",
        "tokenizer.config:TrainConfig",
        "data.train_tokenizer:run",
    ),
    "tokenizer show": Command(
        "tokens of a text in colour, and the merges that made them",
        "tokenizer.config:ShowConfig",
        "tokenizer.show:run",
        "show_tokens",
    ),
    "prepare": Command(
        "text or instructions to token shards", "data.config:PrepareConfig", "data.prepare:run"
    ),
    "pretrain": Command(
        "train a model on text, without a teacher",
        "train.config:PretrainConfig",
        "train.run:run",
    ),
    "adapt": Command(
        "fit a teacher to your data with LoRA, before it is cached",
        "train.lora_config:AdaptConfig",
        "train.lora:run",
    ),
    "cache merge": Command(
        "the caches of several teachers into one",
        "cache.merge_config:MergeConfig",
        "cache.merge:run",
    ),
    "cache": Command(
        "let a teacher score a dataset, once",
        "cache.config:CacheConfig",
        "cache.score:run",
    ),
    "synthesize": Command(
        "let a teacher answer prompts: text, dataset and cache",
        "rollouts.synthesize_config:SynthesizeConfig",
        "rollouts.synthesize:run",
    ),
    "prune": Command(
        "cut a student out of a teacher, to start from", "prune.config:PruneConfig", "prune.run:run"
    ),
    "doctor": Command(
        "check data, teacher, cache and student before a long run",
        "doctor.config:DoctorConfig",
        "doctor.run:run",
        "diagnose",
    ),
    "distill": Command(
        "train a student from a teacher", "distill.config:DistillConfig", "distill.run:run"
    ),
    "onpolicy": Command(
        "train a student on texts it writes itself, scored by a teacher",
        "rollouts.onpolicy_config:OnPolicyConfig",
        "rollouts.onpolicy:run",
    ),
    "plan": Command(
        "memory, time and storage of a training run, before it starts",
        "plan.config:PlanConfig",
        "plan.run:run",
    ),
    "evaluate": Command(
        "bits per byte and perplexity of a model",
        "evaluate.config:EvaluateConfig",
        "evaluate.run:run",
    ),
    "quantize": Command(
        "4-bit weights by GPTQ, or 8-bit", "quantize.config:QuantizeConfig", "quantize.run:run"
    ),
    "export gguf": Command(
        "write a GGUF file for llama.cpp", "export.config:GgufConfig", "export.gguf:run"
    ),
    "generate": Command(
        "continue a prompt",
        "inference.config:GenerateConfig",
        "inference.generate:run",
        "stream_text",
    ),
    "chat": Command(
        "talk to a model", "inference.config:ChatConfig", "inference.chat:run", "converse"
    ),
    "report": Command(
        "an HTML page of what a run did", "report.config:ReportConfig", "report.run:run"
    ),
}


def config_classes() -> dict[str, Command]:
    """Names of the configuration classes, each with its command."""
    return {command.config.partition(":")[2]: command for command in COMMANDS.values()}


def run(config: Any, **options: Any) -> Any:
    """Run the command that `config` configures and return its result.

    `options` are the further arguments of that command's function: `on_progress` (a function that
    receives `xinslm.progress.Progress`), `api_key` (`cache` and `synthesize` with an endpoint),
    `on_text` (`generate`). Raises UsageError for settings that cannot work, XinslmError if the
    command fails.
    """
    command = config_classes().get(type(config).__name__)
    if command is None or command.load("config") is not type(config):
        raise TypeError(f"{type(config).__name__} is not the configuration of a command")
    return command.load("run")(config, **options)
