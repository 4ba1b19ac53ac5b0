"""A stand-in teacher for `distill --use-mock`: a small model trained on the same data.

It exercises every part of the pipeline without a real teacher. It knows nothing that the text does
not say, so a student gains nothing from it.
"""

from pathlib import Path

from xinslm.data.dataset import Dataset
from xinslm.distill.config import DistillConfig
from xinslm.progress import Listener, Progress
from xinslm.train.checkpoint import last_checkpoint, read_state
from xinslm.train.config import PretrainConfig
from xinslm.train.run import TEACHER, run

STEPS = 200
"""Optimizer steps of the teacher at most; never more than the student's."""
LEARNING_RATE = 4e-3
NOTE = "the teacher is a stand-in that was trained on this data (--use-mock)"


def train_mock_teacher(config: DistillConfig, dataset: Dataset, on_progress: Listener) -> Path:
    """Train the teacher in the run folder, unless it has been trained; return its model folder."""
    folder = config.output_dir / TEACHER
    made = PretrainConfig(
        data_path=dataset.folder,
        output_dir=folder,
        preset="1m",
        max_seq_length=config.max_seq_length,
        batch_size=config.batch_size,
        max_steps=min(config.max_steps or STEPS, STEPS),
        learning_rate=LEARNING_RATE,
        device=config.device,
        seed=config.seed,
    )
    last = last_checkpoint(folder)
    if last is None or read_state(last).step < (made.max_steps or STEPS):
        on_progress(Progress("distill", note=f"{NOTE}; it is trained now, into {folder}"))
        run(made, on_progress)
    return folder / "checkpoints" / "best"
