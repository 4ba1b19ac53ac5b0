"""The pipeline on the Python API: text in, a distilled and quantized student out.

python examples/pipeline.py book.txt runs/book
"""

import sys
from pathlib import Path

import xinslm


def main(text: str, folder: str, steps: int = 300) -> None:
    out, data = Path(folder), Path(folder) / "data"
    training = {"data_path": data, "max_seq_length": 256, "max_steps": steps}
    small = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    for config in (
        xinslm.TokenizerConfig(data_path=(text,), output_dir=out / "tokenizer", vocab_size=512),
        xinslm.PrepareConfig(data_path=(text,), tokenizer_path=out / "tokenizer", output_dir=data),
        xinslm.PretrainConfig(output_dir=out / "teacher", **training),
        xinslm.CacheConfig(str(out / "teacher"), data, out / "cache", max_seq_length=256),
        xinslm.DistillConfig(output_dir=out / "student", cache=out / "cache", **small, **training),
        xinslm.QuantizeConfig(out / "student", out / "student-4bit", data),
        xinslm.GgufConfig(out / "student-4bit", out / "student.gguf"),
    ):
        print(xinslm.run(config).describe())


if __name__ == "__main__":
    main(*sys.argv[1:3])
