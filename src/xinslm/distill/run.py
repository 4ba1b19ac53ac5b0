"""The stage `distill`: train a student from a teacher's cache, or from a live teacher.

    xinslm distill --data-path data --cache cache --output-dir runs/student

Everything but the supervision is shared with `pretrain`: see `train/run.py`.
"""

from dataclasses import replace

import torch

from xinslm.baseline import mix_advice
from xinslm.cache.folder import Cache
from xinslm.cache.quality import teacher_nats
from xinslm.data.dataset import Dataset
from xinslm.distill.config import DistillConfig
from xinslm.distill.mock import NOTE, train_mock_teacher
from xinslm.distill.supervision import find_supervision
from xinslm.progress import Listener, ignore
from xinslm.train.config import PretrainConfig
from xinslm.train.interfaces import Supervision
from xinslm.train.run import PATHS, TrainResult, add_warning, run_training


def run(config: DistillConfig, on_progress: Listener = ignore) -> TrainResult:
    """Train a student from its cache or live teacher.

    Raises UsageError if stages do not fit each other or the run folder holds something else,
    XinslmError at the first loss that is not finite, Interrupted (after a checkpoint) on Ctrl-C.
    """
    paths = (*PATHS, "cache", "more_caches", "hidden_states", "teacher")
    result = run_training(config, "distill", _supervise, paths, on_progress)
    if config.cache is None or config.loss.beta == 0 or result.validation is None:
        return result
    caches = (config.cache, *config.more_caches)
    each = [teacher_nats(Cache(folder, check_hashes=False), "validation") for folder in caches]
    best = min((nats for nats in each if nats is not None), default=None)
    advice = mix_advice(result.validation.ce, best, "nats per target token")
    return add_warning(result, advice) if advice else result


def _supervise(
    config: PretrainConfig, dataset: Dataset, device: torch.device, on_progress: Listener
) -> Supervision:
    """Find the supervision; with `use_mock`, train its teacher first."""
    assert isinstance(config, DistillConfig)
    if not config.use_mock:
        return find_supervision(config, dataset, device, on_progress)
    teacher = train_mock_teacher(config, dataset, on_progress)
    named = replace(config, use_mock=False, teacher=str(teacher))
    found = find_supervision(named, dataset, device, on_progress)
    return replace(found, warnings=(NOTE, *found.warnings))
