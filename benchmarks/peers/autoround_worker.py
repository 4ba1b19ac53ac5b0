"""The peer of `quantize`: AutoRound, on given rows; prints one JSON line.

Runs in an environment of its own:
    python3 -m venv autoround && autoround/bin/pip install torch==2.13.0 transformers==5.23.0
    auto-round==0.16.1
    autoround/bin/python autoround_worker.py --model DIR --rows rows.npz --output DIR
    --settings '{"batch_size": 4}'

`rows.npz` holds `input_ids` and `segments`, both (rows, length). A row is a calibration sample:
AutoRound wants samples of one length, so the documents of a packed row attend to those before them,
as in its own concatenated datasets; padding (segment -1) is masked. The output is a folder in the
GPTQ format: 4-bit codes in symmetric groups of 32.
"""

import argparse
import json
import time

import auto_round
import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def samples(path: str, padding: int) -> list[dict[str, torch.Tensor]]:
    """Rows, each with its attention mask."""
    stored = np.load(path)
    mask = stored["segments"] >= 0
    ids = np.where(mask, stored["input_ids"], padding)
    return [
        {"input_ids": torch.tensor(row)[None], "attention_mask": torch.tensor(real)[None].long()}
        for row, real in zip(ids, mask, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="of AutoRound, JSON")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = samples(args.rows, tokenizer.pad_token_id)
    tokens = sum(int(row["attention_mask"].sum()) for row in rows)  # it masks the last of each
    work = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=32,
        sym=True,
        dataset=rows,
        nsamples=len(rows),
        seqlen=rows[0]["input_ids"].shape[1],
        device_map="cpu",
        **args.settings,
    )
    start = time.perf_counter()
    work.quantize_and_save(args.output, format="auto_gptq")
    facts = {
        "peer": f"auto-round {auto_round.__version__}",
        "settings": args.settings,
        "examples": len(rows),
        "tokens": tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "dtype": str(next(model.parameters()).dtype),
    }
    print("\n" + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
