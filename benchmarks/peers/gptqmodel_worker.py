"""The peer of `quantize`: GPTQModel, on given rows; prints one JSON line.

Runs in an environment of its own (GPTQModel's metadata asks for an older numpy and for torchao):
    python3 -m venv gptqmodel && gptqmodel/bin/pip install torch==2.13.0 transformers==5.23.0
    accelerate datasets device-smi tokenicer logbar defuser pypcre threadpoolctl ninja pillow
    python-dateutil requests && gptqmodel/bin/pip install --no-deps optimum==2.3.0 gptqmodel==7.5.0
    gptqmodel/bin/python gptqmodel_worker.py --model DIR --rows rows.npz --output DIR
    --settings '{"mse": 2.4}'

`rows.npz` holds `input_ids` and `segments`, both (rows, length): each document of a packed row (a
segment, -1 on padding) is a calibration example of its own, so that it attends to itself alone. The
output is a folder in the GPTQ format: 4-bit codes in symmetric groups of 32.
"""

import argparse
import json
import os
import time

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one, its pool refuses to start

import gptqmodel
import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig


def documents(path: str) -> list[dict[str, list[int]]]:
    """Calibration examples, one a segment."""
    stored = np.load(path)
    examples = []
    for ids, segments in zip(stored["input_ids"], stored["segments"], strict=True):
        for number in range(segments.max() + 1):
            own = ids[segments == number].tolist()
            examples.append({"input_ids": own, "attention_mask": [1] * len(own)})
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=os.path.abspath, required=True)
    parser.add_argument("--rows", type=os.path.abspath, required=True)
    parser.add_argument("--output", type=os.path.abspath, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="of QuantizeConfig, JSON")
    args = parser.parse_args()
    os.chdir(os.path.dirname(args.rows))  # it leaves its logs in the working folder
    settings = dict(args.settings)
    if settings.pop("gptaq", False):
        settings["gptaq"] = GPTAQConfig()
    config = QuantizeConfig(bits=4, group_size=32, sym=True, device="cpu", **settings)
    model = GPTQModel.load(args.model, config, dtype=torch.float32)
    examples = documents(args.rows)
    start = time.perf_counter()
    model.quantize(examples, batch_size=1, calibration_data_min_length=0)
    seconds = time.perf_counter() - start
    model.save(args.output)
    facts = {
        "peer": f"gptqmodel {gptqmodel.__version__}",
        "settings": args.settings,
        "examples": len(examples),
        "tokens": sum(len(example["input_ids"]) for example in examples),
        "seconds": round(seconds, 1),
    }
    print("\n" + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
