"""The demo's commands, in order, and how long each takes by the machine's speed and the number of
prompts.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from xinslm.demo.config import DemoConfig

INSTRUCTIONS = "instructions.jsonl"
TEACHER, PRUNED, STUDENT, PLAIN, SMALL = (
    "teacher",
    "pruned, not trained",
    "distilled student",
    "undistilled, same start",
    "distilled student, 4-bit",
)
"""Names of the models in the report."""
SHARE = 0.88
"""Parameters of the student as a share of the teacher's, at most."""
SHARE_OF_LAYERS = 28 / 30
NEURONS_STEP = 64
SMALL_ROWS = 64
"""Rows of 256 tokens that calibrate the 4-bit student, at most; a prompt gives about one."""
VOCAB_SIZE = 32768
WRITING = "--temperature 0.3 --top-p 0.9 --repetition-penalty 1.1 --max-new-tokens 120"


@dataclass(frozen=True)
class Stage:
    """One command; the part after `xinslm` is a line as a shell takes it."""

    title: str
    command: str
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What a demo will run."""

    config: DemoConfig
    teacher: str
    """Folder of the teacher."""
    stages: list[Stage] = field(default_factory=list)

    def add(self, title: str, seconds: float, *parts: str) -> None:
        """Append a stage whose command is the parts joined by spaces."""
        self.stages.append(Stage(title, " ".join(parts), seconds))

    def path(self, name: str) -> str:
        """A path inside the output folder, quoted for a shell."""
        return shlex.quote(str(self.config.output_dir / name))


def shape_for(
    teacher: dict[str, Any], vocab_size: int, num_layers: int | None = None
) -> tuple[int, int]:
    """Layers and feed-forward neurons of a student with at most `SHARE` of its teacher's
    parameters.

    Neurons are cut where the layers alone leave too many parameters.
    """
    hidden, heads = teacher["hidden_size"], teacher["num_attention_heads"]
    head_dim = teacher.get("head_dim") or hidden // heads
    key_values = teacher.get("num_key_value_heads") or heads
    attention = 2 * hidden * head_dim * (heads + key_values) + 2 * hidden
    neurons, depth = teacher["intermediate_size"], teacher["num_hidden_layers"]
    embeddings = hidden * (1 if teacher.get("tie_word_embeddings") else 2)
    total = (attention + 3 * hidden * neurons) * depth + embeddings * teacher["vocab_size"]
    layers = min(depth, num_layers or round(SHARE_OF_LAYERS * depth))
    room = (SHARE * total - embeddings * vocab_size) / layers - attention
    wanted = int(room / (3 * hidden)) // NEURONS_STEP * NEURONS_STEP
    return layers, max(min(NEURONS_STEP, neurons), min(neurons, wanted))


def real_stages(
    config: DemoConfig, teacher: str, shape: tuple[int, int], rate: float, prompts: int
) -> list[Stage]:
    """Commands that make a student of a chat model.

    rate: matrix products, billions of operations per second. prompts: number to train on.
    """
    plan = Plan(config, shlex.quote(teacher))
    path, teacher = plan.path, plan.teacher
    # above 600 GFLOP/s other work than these products sets the pace
    seed, slow = f"--seed {config.seed}", 130 / min(rate, 600)
    answers = f"--max-new-tokens {config.max_new_tokens} --temperature 0.7 --top-p 0.95 {seed}"
    plan.add(
        "cut the vocabulary to its first merges",
        4,
        f"tokenizer train --prefix-of {teacher} --vocab-size {config.vocab_size or VOCAB_SIZE}",
        f"--output-dir {path('tokenizer')}",
    )
    plan.add(
        "the teacher answers prompts",
        (0.2 + 0.8 * slow) * prompts,
        f"synthesize {teacher} --prompts {path('prompts.jsonl')} --output-dir {path('answers')}",
        f"--tokenizer-path {path('tokenizer')} --samples {config.samples} {answers}",
        "--max-seq-length 512",
    )
    plan.add(
        "the teacher answers held-out prompts",
        12 * slow,
        f"synthesize {teacher} --prompts {path('held-out.jsonl')} --output-dir {path('held-out')}",
        f"{answers} --no-keep-cache",
    )
    plan.add(
        f"prune the teacher to {shape[0]} layers of {shape[1]:,} neurons",
        (25 + 1.1 * min(prompts, 288)) * slow,
        f"prune {teacher} --data-path {path('answers/data')} --output-dir {path('pruned')}",
        f"--num-layers {shape[0]} --intermediate-size {shape[1]} --layers influence",
        "--num-calibration-samples 96 --ridge 0.3 --num-search-samples 4 --max-eval-samples 4",
        "--max-seq-length 512",
    )
    _train(plan, 1.5 * prompts * slow, f"--max-seq-length 512 --batch-size 2 {seed}")
    rows = max(1, min(prompts // 2, SMALL_ROWS))
    _small(plan, (20 + 2.2 * rows) * slow, rows)
    texts = (("held-out answers", "held-out/text.jsonl"), ("other text", "paragraphs.jsonl"))
    models = ((TEACHER, teacher), *_models(path))
    for title, file in texts:
        for name, model in models:
            _evaluate(plan, 3 + 4 * slow, f"{name} on {title}", model, name, f"{path(file)}")
    _answer(plan, 10 * slow, teacher)
    return plan.stages


def built_in_stages(config: DemoConfig) -> list[Stage]:
    """Commands that train a small teacher on generated stories and distill it."""
    plan = Plan(config, shlex.quote(str(config.output_dir / "teacher")))
    path, teacher = plan.path, plan.teacher
    train = f"--max-seq-length 256 --batch-size 8 --learning-rate 4e-3 --seed {config.seed}"
    data = f"--data-path {path('answers/data')}"
    plan.add(
        "learn a tokenizer",
        2,
        f"tokenizer train --data-path {path('stories.jsonl')} --output-dir {path('tokenizer')}",
        f"--vocab-size {config.vocab_size or 1024}",
    )
    plan.add(
        "tokenize the stories",
        3,
        f"prepare --data-path {path('stories.jsonl')} --tokenizer-path {path('tokenizer')}",
        f"--output-dir {path('answers/data')}",
    )
    plan.add(
        "train a teacher",
        45,
        f"pretrain {data} --output-dir {teacher} {train} --hidden-size 128 --num-layers 6",
        "--num-heads 4 --num-kv-heads 2 --intermediate-size 384",
        f"--max-steps {config.teacher_steps}",
    )
    plan.add(
        "the teacher scores the stories",
        12,
        f"cache {teacher} {data} --output-dir {path('answers/cache')} --max-seq-length 256",
    )
    plan.add(
        "prune the teacher to 4 layers of half the width",
        8,
        f"prune {teacher} {data} --output-dir {path('pruned')} --num-layers 4 --hidden-size 64",
        "--num-heads 2 --intermediate-size 192 --max-seq-length 256 --max-eval-samples 8",
        "--num-calibration-samples 16 --num-search-samples 4",
    )
    _train(plan, 15, f"{train} --max-steps {config.student_steps or 300}")
    _small(plan, 20, 24)
    for name, model in ((TEACHER, teacher), *_models(path)):
        _evaluate(plan, 3, name, model, name, path("answers/data"))
    _answer(plan, 3, teacher)
    return plan.stages


def _models(path: Any) -> Sequence[tuple[str, str]]:
    folders = ("pruned", "student", "undistilled", "student-4bit")
    return list(zip((PRUNED, STUDENT, PLAIN, SMALL), map(path, folders), strict=True))


def _train(plan: Plan, seconds: float, settings: str) -> None:
    """The student and its twin without teacher targets: same start, same data, same order."""
    path, config = plan.path, plan.config
    settings += f" --init-from {path('pruned')} --data-path {path('answers/data')}"
    if not config.built_in:
        settings += f" {RECIPE}"
        if config.student_steps is not None:
            settings += f" --max-steps {config.student_steps}"
    plan.add(
        "distill",
        seconds,
        f"distill --cache {path('answers/cache')} --output-dir {path('student')} {settings}",
        "" if config.built_in else LOSS,
    )
    plan.add(
        "train the same start without the teacher's distributions",
        seconds,
        f"pretrain --output-dir {path('undistilled')} {settings}",
    )


RECIPE = (
    "--learning-rate 6e-5 --warmup-ratio 0.1 --num-epochs 1 --eval-steps 1000 --max-eval-samples 4"
)
LOSS = "--loss.alpha 0.5 --loss.beta 0.5"


def _small(plan: Plan, seconds: float, rows: int) -> None:
    path = plan.path
    run = f"--run {path('student')}"
    plan.add(
        "4-bit weights",
        seconds,
        f"quantize {path('student')} --data-path {path('answers/data')} {run}",
        f"--output-dir {path('student-4bit')} --num-calibration-samples {rows}",
        "--max-seq-length 256",
    )
    plan.add(
        "a GGUF file for llama.cpp",
        4,
        f"export gguf {path('student-4bit')} --output-path {path('student.gguf')} {run}",
    )


def _evaluate(plan: Plan, seconds: float, title: str, model: str, name: str, data: str) -> None:
    plan.add(
        f"measure: {title}",
        seconds,
        f"evaluate {model} --data-path {data} --run {plan.path('student')}",
        f"--name {shlex.quote(name)}",
    )


def _answer(plan: Plan, seconds: float, teacher: str) -> None:
    """Teacher and the student's GGUF file answer the questions."""
    path = plan.path
    for title, model, folder in (
        ("the teacher answers unseen questions", teacher, "answers-teacher"),
        ("the 4-bit student answers them", path("student.gguf"), "answers-student"),
    ):
        plan.add(
            title,
            seconds,
            f"synthesize {model} --prompts {path('questions.jsonl')} --output-dir {path(folder)}",
            f"{WRITING} --validation-fraction 0 --no-keep-cache --seed {plan.config.seed}",
        )
    if not plan.config.built_in and find_spec("lm_eval"):
        plan.add(
            "teacher and 4-bit student follow instructions",
            2 * seconds,
            f"benchmark {path('student.gguf')} --against {teacher} --run {path('student')}",
            f"--tasks {path(INSTRUCTIONS)} --max-new-tokens 40 --name {shlex.quote(SMALL)}",
        )
    plan.add("write the report", 1, f"report {path('student')} --compare {path('undistilled')}")
