"""Every benchmark behind docs/results.md that needs no peer's environment, one after another: `make
bench`.

    python benchmarks/run_all.py --data ../shared/data --work /tmp/xinslm-bench

The comparison with transformers' Trainer needs a second environment; `pretrain_vs_trainer.py
--help` says how.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=Path("/tmp/xinslm-bench"))
    args = parser.parse_args()
    if not args.data.is_dir():
        sys.exit(
            f"the benchmarks need real models and text, and {args.data} is not there; pass --data"
        )
    common = ["--data", str(args.data), "--work", str(args.work)]
    for script in (
        ["bpe.py", str(args.data / "text" / "peps.jsonl.gz")],
        ["real_teachers.py", *common, "--teacher", "stories260K"],
        ["real_teachers.py", *common, "--teacher", "stories5M"],
        ["peps.py", *common],
        ["gguf_in_llama_cpp.py", "--folder", str(args.work)],
    ):
        print(f"\n== {' '.join(script)}", flush=True)
        subprocess.run([sys.executable, str(HERE / script[0]), *script[1:]], check=True)


if __name__ == "__main__":
    main()
