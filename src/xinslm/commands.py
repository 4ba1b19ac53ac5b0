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
    example: str
    """Arguments of one typical call, for `--help`."""
    most_used: str
    """Names of the options that `--help` shows first: those that are required, and five at most."""
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
        "make a small chat model out of a real one, in a few minutes",
        "demo.config:DemoConfig",
        "demo.run:run",
        example="-o demo-run",
        most_used="output_dir teacher built_in num_prompts num_layers",
        present="play_demo",
    ),
    "tokenizer train": Command(
        "learn a byte-level BPE from text, or cut one out of a teacher's",
        "tokenizer.config:TokenizerConfig",
        "data.train_tokenizer:run",
        example="--data-path text/ --vocab-size 8192 -o tokenizer",
        most_used="data_path output_dir vocab_size prefix_of special_tokens",
    ),
    "tokenizer show": Command(
        "tokens of a text in colour, and the merges that made them",
        "tokenizer.config:ShowConfig",
        "tokenizer.show:run",
        example="'Once upon a time' --tokenizer-path tokenizer",
        most_used="text tokenizer_path num_pieces allow_special",
        present="show_tokens",
    ),
    "prepare": Command(
        "text or instructions to token shards",
        "data.config:PrepareConfig",
        "data.prepare:run",
        example="--data-path text/ --tokenizer-path tokenizer -o data --show 3",
        most_used="data_path tokenizer_path output_dir validation_fraction show",
    ),
    "pretrain": Command(
        "train a model on text, without a teacher",
        "train.config:PretrainConfig",
        "train.run:run",
        example="--data-path data --preset 10m -o model",
        most_used="data_path output_dir preset max_steps batch_size",
    ),
    "adapt": Command(
        "fit a teacher to your data with LoRA, before it is cached",
        "train.lora_config:AdaptConfig",
        "train.lora:run",
        example="teacher --data-path data -o adapter --max-steps 200",
        most_used="teacher data_path output_dir max_steps lora_r",
    ),
    "cache merge": Command(
        "the caches of several teachers into one",
        "cache.merge_config:MergeConfig",
        "cache.merge:run",
        example="cache-a cache-b -o cache --weights 2 1",
        most_used="caches output_dir weights domain_weights token_temperature",
    ),
    "cache": Command(
        "let a teacher score a dataset, once",
        "cache.config:CacheConfig",
        "cache.score:run",
        example="teacher --data-path data -o cache --max-seq-length 512",
        most_used="teacher data_path output_dir max_seq_length top_k",
    ),
    "synthesize": Command(
        "let a teacher answer prompts: text, dataset and cache",
        "rollouts.synthesize_config:SynthesizeConfig",
        "rollouts.synthesize:run",
        example="teacher --prompts prompts.jsonl -o answers --samples 4",
        most_used="teacher prompts output_dir samples max_new_tokens",
    ),
    "prune": Command(
        "cut a student out of a teacher, to start from",
        "prune.config:PruneConfig",
        "prune.run:run",
        example="teacher --data-path data --num-layers 12 --hidden-size 768 -o start",
        most_used="teacher data_path output_dir num_layers hidden_size",
    ),
    "doctor": Command(
        "check data, teacher, cache and student before a long run",
        "doctor.config:DoctorConfig",
        "doctor.run:run",
        example="--data-path data --cache cache --teacher teacher",
        most_used="data_path cache teacher student adapter",
        present="diagnose",
    ),
    "doctor compare": Command(
        "compare two model files of any kind: weights, codes, tokenizer, chats",
        "doctor.config:CompareConfig",
        "doctor.compare:run",
        example="student-4bit student.gguf",
        most_used="model other predictions device",
        present="diagnose",
    ),
    "distill": Command(
        "train a student from a teacher",
        "distill.config:DistillConfig",
        "distill.run:run",
        example="--data-path data --cache cache -o student --preset 10m",
        most_used="data_path cache output_dir preset max_steps",
    ),
    "onpolicy": Command(
        "train a student on texts it writes itself, scored by a teacher",
        "rollouts.onpolicy_config:OnPolicyConfig",
        "rollouts.onpolicy:run",
        example="--student student --teacher teacher --prompts data -o better",
        most_used="student teacher prompts output_dir rounds",
    ),
    "plan": Command(
        "memory, time and storage of a training run, before it starts",
        "plan.config:PlanConfig",
        "plan.run:run",
        example="--data-path data --cache cache --preset 135m --memory 16",
        most_used="data_path preset batch_size max_seq_length memory",
    ),
    "evaluate": Command(
        "bits per byte and perplexity of a model",
        "evaluate.config:EvaluateConfig",
        "evaluate.run:run",
        example="student --data-path data --run student",
        most_used="model data_path run name max_documents",
    ),
    "benchmark": Command(
        "HellaSwag, MMLU, TruthfulQA, HumanEval, instructions; speed and memory",
        "evaluate.benchmark.config:BenchmarkConfig",
        "evaluate.benchmark.run:run",
        example="student --tasks hellaswag mmlu --data bench --against teacher",
        most_used="model tasks data against run",
    ),
    "quantize": Command(
        "4-bit weights by GPTQ, or 8-bit",
        "quantize.config:QuantizeConfig",
        "quantize.run:run",
        example="student --data-path data -o student-4bit",
        most_used="model data_path output_dir bits method",
    ),
    "import": Command(
        "write a GGUF file as a Hugging Face folder",
        "export.config:ImportConfig",
        "export.folder:run",
        example="SmolLM2.Q4_1.gguf -o smollm2",
        most_used="model output_dir dtype tokenizer_path force",
    ),
    "export gguf": Command(
        "write a GGUF file for llama.cpp",
        "export.config:GgufConfig",
        "export.gguf:run",
        example="student-4bit -o student.gguf --run student --ollama",
        most_used="model output_path run ollama lmstudio",
    ),
    "export packed": Command(
        "write a file that the native engine maps and uses in place",
        "export.config:PackedConfig",
        "export.packed:run",
        example="student-4bit -o student.packed",
        most_used="model output_path force",
    ),
    "export hf": Command(
        "write a model, 4-bit or not, for transformers and vLLM",
        "export.config:HfConfig",
        "export.packed_folder:run_hf",
        example="student-4bit -o student-hf",
        most_used="model output_dir format dtype run",
    ),
    "export mlx": Command(
        "write a model, 4-bit or not, for mlx-lm",
        "export.config:MlxConfig",
        "export.packed_folder:run_mlx",
        example="student-4bit -o student-mlx",
        most_used="model output_dir dtype run force",
    ),
    "export coreml": Command(
        "write a model, 4-bit or not, as a Core ML program",
        "export.config:CoremlConfig",
        "export.coreml.run:run",
        example="student-4bit -o student-coreml",
        most_used="model output_dir max_seq_length compute_units force",
    ),
    "export all": Command(
        "write a model as GGUF, for transformers and vLLM, and for mlx-lm",
        "export.config:AllConfig",
        "export.all:run",
        example="student-4bit -o exports",
        most_used="model output_dir dtype run force",
    ),
    "publish": Command(
        "upload an exported folder to the Hugging Face Hub",
        "export.config:PublishConfig",
        "export.publish:run",
        example="exports/hf me/student --dry-run",
        most_used="folder repo public dry_run message",
    ),
    "generate": Command(
        "continue a prompt",
        "inference.config:GenerateConfig",
        "inference.generate:run",
        example="student --prompt 'One morning' --max-new-tokens 100",
        most_used="model prompt max_new_tokens temperature chat",
        present="stream_text",
    ),
    "native": Command(
        "show what the native library is, and whether it runs a model",
        "inference.config:NativeConfig",
        "inference.native_info:run",
        example="student-4bit",
        most_used="model",
    ),
    "chat": Command(
        "talk to a model",
        "inference.config:ChatConfig",
        "inference.chat:run",
        example="student-4bit --temperature 0.5",
        most_used="model system max_new_tokens temperature seed",
        present="converse",
    ),
    "report": Command(
        "an HTML page of what a run did",
        "report.config:ReportConfig",
        "report.run:run",
        example="student --compare undistilled",
        most_used="run compare output_dir x log_x",
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
