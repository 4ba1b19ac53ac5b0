"""A random teacher with a tokenizer, and a dataset made with it; its text is random ids."""

from dataclasses import dataclass
from pathlib import Path

import torch

from small_models import save_dataset, save_random_model
from xinslm.model.transformer import Transformer
from xinslm.prune.config import PruneConfig
from xinslm.prune.measure import Passage, Statistics, measure, read_passages
from xinslm.tokenizer.load import load_tokenizer


@dataclass(frozen=True)
class Workshop:
    teacher: Path
    data: Path
    model: Transformer
    passages: list[Passage]
    found: Statistics

    def config(self, output_dir: Path, **changes) -> PruneConfig:
        settings = {
            "teacher": str(self.teacher),
            "data_path": self.data,
            "max_seq_length": 32,
            "device": "cpu",
        }
        settings |= {"num_calibration_samples": 16, "num_search_samples": 4, "max_eval_samples": 4}
        return PruneConfig(output_dir=output_dir, **(settings | changes))


def make_workshop(folder: Path, **shape) -> Workshop:
    torch.set_grad_enabled(True)
    teacher, data = folder / "teacher", folder / "data"
    model = save_random_model(teacher, **shape).requires_grad_(False)
    tokenizer = load_tokenizer(teacher)
    save_dataset(data, tokenizer.fingerprint())
    tokenizer.save(data / "tokenizer")
    from xinslm.data.dataset import open_dataset

    passages = read_passages(open_dataset(data).split("train"), 32, None, torch.device("cpu"))
    return Workshop(teacher, data, model, passages, measure(model, passages, lambda layer: None))
