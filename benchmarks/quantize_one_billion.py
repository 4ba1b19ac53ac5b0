"""The 1B preset quantized and exported: wall time and peak memory of each step.

    OMP_NUM_THREADS=2 python benchmarks/quantize_one_billion.py --data ../shared/data --work /tmp/one_b

Weights are random, in a file that is written one matrix at a time: time and memory do not depend on
what a model has learned, and nothing is claimed about quality. The text is the PEPs under LLaMA-2's
32,000 tokens. Each step is a process of its own; its memory is the kernel's high-water mark of
resident memory, memory-mapped files included. `--layers-limit 2` makes a model of two layers and
extrapolates to all 28; a run that was stopped continues, and then times only what was left.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from machine import describe

from xinslm.model.config import PRESETS, ModelConfig
from xinslm.model.names import WEIGHTS
from xinslm.model.safetensors_writer import SafetensorsWriter
from xinslm.model.source import weight_shapes, write_config

LAYERS = PRESETS["1b"].num_hidden_layers
EXPORTS = {
    "export gguf": ("gguf", "model.gguf"),
    "export hf": ("hf", "hf"),
    "export hf --format gptq": ("hf", "gptq", "--format", "gptq"),
    "export mlx": ("mlx", "mlx"),
    "export coreml": ("coreml", "coreml"),
}
"""Kind of export, what it writes, and options."""


def make_model(folder: Path, tokenizer: Path, layers: int, dtype: torch.dtype) -> None:
    """A model folder of the preset's shape with random weights; memory holds one matrix."""
    if (folder / WEIGHTS).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    preset = PRESETS["1b"]
    config = ModelConfig(
        vocab_size=32000,
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=preset.num_attention_heads,
        num_key_value_heads=preset.num_key_value_heads,
        head_dim=preset.head_dim,
        bos_token_id=1,
        eos_token_id=2,
    )
    shapes, generator = weight_shapes(config), torch.Generator().manual_seed(0)
    partial = folder / f"{WEIGHTS}.partial"
    with SafetensorsWriter(partial, list(shapes)) as file:
        for name, shape in shapes.items():
            weight = torch.ones(shape)
            if len(shape) > 1:
                weight.normal_(0, 0.02, generator=generator)
            file.add(name, weight.to(dtype))
    write_config(config.to_hf(), folder, dtype)
    shutil.copy(tokenizer / "tokenizer.model", folder / "tokenizer.model")
    os.replace(partial, folder / WEIGHTS)


def measured(command: list[str]) -> tuple[float, float]:
    """Run a process; return its wall time in seconds and its peak of resident memory in GB."""
    began = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"ended with {process.returncode}: {' '.join(command)}")
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e9


def quantize(work: Path, rows: int, length: int, method: str) -> None:
    """The measured process: quantize, and write the seconds at which each layer began."""
    from xinslm.quantize.config import QuantizeConfig
    from xinslm.quantize.run import run

    began, times = time.perf_counter(), []

    def listen(progress) -> None:
        times.append((progress.done, time.perf_counter() - began))
        print(f"{times[-1][1]:8.1f} s  {progress.done} layers {progress.note}", flush=True)

    config = QuantizeConfig(
        work / "model",
        work / "4bit",
        data_path=work / "data",
        method=method,
        num_calibration_samples=rows,
        max_seq_length=length,
    )
    print(run(config, listen).describe())
    (work / "times.json").write_text(json.dumps(times))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--method", default="gptaq")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--layers-limit", type=int, default=LAYERS)
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = args.work
    if args.measured:
        return quantize(work, args.rows, args.length, args.method)
    if args.data is None:
        parser.error("--data is needed")
    tokenizer = work / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.data / "tokenizers" / "llama2_32k.model", tokenizer / "tokenizer.model")
    make_model(work / "model", tokenizer, args.layers_limit, getattr(torch, args.dtype))
    xinslm = [sys.executable, "-m", "xinslm"]
    if not (work / "data" / "manifest.json").is_file():
        text = str(args.data / "text" / "peps.jsonl.gz")
        words = [
            "--tokenizer-path",
            str(tokenizer),
            "--max-tokens",
            str(3 * args.rows * args.length),
        ]
        command = [*xinslm, "prepare", "--data-path", text, *words, "-o", str(work / "data")]
        subprocess.run(command, check=True)
    print(
        f"{describe()}\n{os.environ.get('OMP_NUM_THREADS', 'all')} threads, {args.layers_limit} "
        f"layers in {args.dtype}, {args.method}, {args.rows} rows of {args.length} tokens\n",
        flush=True,
    )
    figures = {}
    if not (work / "4bit").is_dir():
        own = [sys.executable, __file__, "--work", str(work), "--measured", "--method", args.method]
        own += ["--rows", str(args.rows), "--length", str(args.length)]
        figures["quantize"] = measured(own)
    for name, (kind, out, *options) in EXPORTS.items():
        if kind == "coreml" and find_spec("coremltools") is None:
            print("export coreml: not run, coremltools is not installed")
            continue
        words = ["export", kind, str(work / "4bit"), "-o", str(work / out), "--force", *options]
        figures[name] = measured([*xinslm, *words])
    print("\n| step | seconds | peak, GB |\n|---|---|---|")
    for name, (seconds, peak) in figures.items():
        print(f"| {name} | {seconds:.0f} | {peak:.2f} |")
    if "quantize" in figures:
        times = [seconds for done, seconds in json.loads((work / "times.json").read_text())]
        each = (times[-1] - times[0]) / args.layers_limit
        whole = figures["quantize"][0] + (LAYERS - args.layers_limit) * each
        print(f"\n{each:.1f} s a layer; {LAYERS} layers: {whole / 60:.1f} min")


if __name__ == "__main__":
    main()
