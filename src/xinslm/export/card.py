"""The model card of an export, README.md: what it is, how it was made, what was measured, how to
run it.

Each statement is read from a file: the weights that were written, or the records that
`provenance.py` follows. What no file says is not mentioned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.export.config import NEURAL_ENGINE
from xinslm.export.kinds import CARD
from xinslm.export.provenance import Provenance, Step, front_matter, short_name, trace
from xinslm.files import MANIFEST, manifest_fingerprint, read_json, write_text
from xinslm.model.source import ModelSource

_QUANTIZED = {
    "4-bit": "4-bit",
    "8-bit": "8-bit",
    "4-bit palette": "4-bit",
    "8-bit palette": "8-bit",
    "Q4_0": "4-bit",
    "Q4_K": "4-bit",
    "Q5_0": "5-bit",
    "Q8_0": "8-bit",
}


@dataclass(frozen=True)
class Export:
    """What a card is about."""

    source: ModelSource
    library: str
    """The Hub's name of the library: transformers, mlx, gguf, coreml."""
    file: str
    """The file with the weights."""
    file_bytes: int
    types: Mapping[str, int]
    """Number of tensors by how they are stored."""
    context: int
    commands: Mapping[str, str]
    """Commands by the runtime that they start."""
    run: Path | None = None
    """Run folder with what was measured."""
    measured: Sequence[str] = ()
    """What the export measured itself, a sentence each."""


def commands(library: str, method: str | None, has_chat: bool) -> dict[str, str]:
    """Commands that run an export, by runtime; `method` is that of transformers' quantization, of
    Core ML the compute units, of GGUF the name of the file.
    """
    if library == "gguf":
        file = method or "model.gguf"
        return {
            "llama.cpp": f"llama-cli -m {file} --no-mmap",
            "Ollama": "ollama create NAME -f Modelfile\nollama run NAME",
            "LM Studio": f"lms import {file}",
        }
    if library == "coreml":
        units = {"cpu-only": "CPU_ONLY", "all": "ALL", NEURAL_ENGINE: "CPU_AND_NE"}
        unit = f"ct.ComputeUnit.{units.get(method or '', 'CPU_AND_GPU')}"
        load = f"print(ct.models.MLModel('FOLDER/model.mlpackage', compute_units={unit}))"
        return {"Core ML": f'pip install coremltools\npython -c "import coremltools as ct; {load}"'}
    if library == "mlx":
        last = "mlx_lm.chat --model FOLDER"
        if not has_chat:
            last = "mlx_lm.generate --model FOLDER --prompt 'One morning'"
        return {"mlx-lm": f"pip install mlx-lm\n{last}"}
    package = {"compressed-tensors": " compressed-tensors", "gptq": " gptqmodel optimum"}
    install = f"pip install transformers accelerate{package.get(method or '', '')}"
    call = "transformers.pipeline('text-generation', 'FOLDER')('One morning')"
    return {
        "transformers": f'{install}\npython -c "import transformers; print({call})"',
        "vLLM": "vllm serve FOLDER",
    }


def write_card(folder: Path, export: Export) -> None:
    """Write README.md into a folder."""
    write_text(folder / CARD, make_card(export))


def make_card(export: Export) -> str:
    """Compose the card."""
    source = export.source
    history = trace(source.path, export.run)
    title = short_name(source.name).removesuffix(".gguf")
    bits = sorted({_QUANTIZED[kind] for kind in export.types if kind in _QUANTIZED})
    head = front_matter(
        {
            "license": history.license,
            "base_model": history.base_model,
            "library_name": export.library,
            "pipeline_tag": "text-generation",
            "tags": ["xinslm", *bits],
        }
    )
    parts = [
        f"# {title}\n",
        "\n".join(_table(("", ""), _facts(export))) + "\n",
        *_section("How it was made", [f"- {line}" for line in _history(history)]),
        *_section("Measured", _measured(history, export.measured)),
        *_section("Run it", _commands(export)),
    ]
    return head + "\n" + "\n".join(parts)


def _section(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}\n", "\n".join(lines) + "\n"] if lines else []


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [header, ("---",) * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _facts(export: Export) -> list[tuple[str, ...]]:
    source, model = export.source, export.source.config
    census = ", ".join(f"{count} {kind}" for kind, count in sorted(export.types.items()))
    weights = source.num_weights
    return [
        ("architecture", str(source.settings.get("model_type", "llama"))),
        ("parameters", f"{weights:,}"),
        ("layers, width", f"{model.num_hidden_layers}, {model.hidden_size:,}"),
        ("vocabulary", f"{model.vocab_size:,} tokens"),
        ("context", f"{export.context:,} tokens"),
        ("tensors", census),
        (
            export.file,
            f"{export.file_bytes / 1e6:,.1f} MB, {8 * export.file_bytes / weights:.2f} bits a "
            "weight",
        ),
    ]


def _history(history: Provenance) -> Iterator[str]:
    """A line for each step, the first one first."""
    for step in reversed(history.steps):
        yield f"`{step.command}`" + "".join(f"; {fact}" for fact in _step_facts(step))


def _step_facts(step: Step) -> Iterator[str]:
    settings, facts = step.settings, step.facts
    for role, what in (("model", "of"), ("init_from", "from"), ("teacher", "teacher")):
        if settings.get(role):
            yield f"{what} {_named(settings[role])}"
    named = (settings.get("cache"), *(settings.get("more_caches") or ()))
    weights = settings.get("cache_weights") or ()
    for number, cache in enumerate(filter(None, named), 1):
        role = "cache" if number == 1 else f"cache_{number}"
        if teacher := _teacher_of(Path(str(cache)), step.inputs.get(role)):
            weight = f" (weight {weights[number - 1]:g})" if number <= len(weights) else ""
            yield f"teacher {_named(teacher)}, by its cached distributions{weight}"
    if step.command == "quantize":
        kinds = set((facts.get("formats") or {}).values()) & {"q4_0", "q8_0"}
        bits = sorted(kind[1] for kind in kinds) or [str(facts.get("bits"))]
        yield f"{' and '.join(bits)} bits, method {facts.get('method')}"
    if isinstance(facts.get("total_steps"), int):
        yield f"{facts['total_steps']:,} steps"
    for key in ("date", "made_by"):
        if facts.get(key):
            yield str(facts[key])
    for role, fingerprint in step.inputs.items():
        yield f"{role} `{fingerprint[:16]}`"


def _named(value: Any) -> str:
    return f"`{short_name(value)}`"


def _teacher_of(cache: Path, fingerprint: str | None) -> str | None:
    """The teacher that a cache names, if the cache is the one that was read."""
    if not (cache / MANIFEST).is_file() or manifest_fingerprint(cache) != fingerprint:
        return None
    teacher = read_json(cache / MANIFEST).get("config", {}).get("teacher")
    return str(teacher) if teacher else None


def _measured(history: Provenance, sentences: Sequence[str]) -> list[str]:
    """Tables of what the run folder holds, then a list of sentences."""
    texts = [
        (
            str(row["name"]),
            short_name(row.get("data", "")),
            f"{row['bits_per_byte']:.4f}",
            f"{row['perplexity']:.3f}",
        )
        for row in history.evaluations
        if _numbers(row, "bits_per_byte", "perplexity")
    ]
    tasks = [
        (
            str(row["name"]),
            f"{task.get('task')} ({task.get('num_fewshot')}-shot)",
            str(task.get("metric")),
            f"{task['value']:.4f}",
            str(task["items"]),
        )
        for row in history.benchmarks
        for task in row.get("tasks", [])
        if _numbers(task, "value", "items")
    ]
    lines = _table(("model", "text", "bits per byte", "perplexity"), texts) if texts else []
    if tasks:
        lines += [""] if lines else []
        lines += _table(("model", "task", "metric", "value", "items"), tasks)
    if sentences:
        lines += [""] if lines else []
        lines += [f"- {sentence}" for sentence in sentences]
    return lines


def _numbers(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), int | float) for name in names)


def _commands(export: Export) -> list[str]:
    lines = []
    for runtime, command in export.commands.items():
        lines += [f"{runtime}:\n", "```", command, "```", ""]
    if any("FOLDER" in command for command in export.commands.values()):
        return [*lines, "FOLDER is this folder, or the name of this repository on the Hub."]
    return lines[:-1]
