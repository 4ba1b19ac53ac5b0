"""The stage `distill`: train a student from a teacher's cache, or from a live teacher.

    xinslm distill --data-path data --cache cache --output-dir runs/student

Everything but the supervision is `pretrain`'s: see `train/run.py`.
"""

from xinslm.distill.config import DistillConfig
from xinslm.distill.supervision import find_supervision
from xinslm.progress import Listener, ignore
from xinslm.train.run import PATHS, TrainResult, run_training


def run(config: DistillConfig, on_progress: Listener = ignore) -> TrainResult:
    """Train a student from its cache or live teacher.

    Raises UsageError if stages do not fit each other or the run folder holds something else,
    XinslmError at the first loss that is not finite, Interrupted (after a checkpoint) on Ctrl-C.
    """
    paths = (*PATHS, "cache", "hidden_states", "teacher")
    return run_training(config, "distill", find_supervision, paths, on_progress)
