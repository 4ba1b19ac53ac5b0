"""Read a teacher cache: what the teacher predicts at some positions of the text.

python examples/read_cache.py demo-run/cache demo-run/data
"""

import sys
from pathlib import Path

import numpy as np

from xinslm.cache.folder import Cache
from xinslm.data.dataset import open_dataset
from xinslm.tokenizer.load import load_tokenizer


def main(cache_folder: str, data_folder: str, count: int = 8) -> None:
    cache, dataset = Cache(Path(cache_folder)), open_dataset(Path(data_folder))
    cache.require_dataset(dataset.fingerprint, dataset.folder)
    tokenizer = load_tokenizer(dataset.folder / "tokenizer")
    tokens = dataset.split("train").tokens
    split = cache.split("train")
    assert split is not None
    targets = split.targets(np.arange(count))  # position i predicts token i + 1
    for i in range(count):
        best = targets.top_k_ids[i].tolist()
        shares = targets.top_k_log_probs[i].exp().tolist()
        named = [f"{tokenizer.decode([t])!r} {p:.2f}" for t, p in zip(best, shares, strict=True)]
        rest = targets.log_tail[i].exp().item()
        print(
            f"{tokenizer.decode(tokens[: i + 1].tolist())!r}: {', '.join(named)}, rest {rest:.2f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:3])
