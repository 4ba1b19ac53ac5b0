"""The stage `cache`: a teacher scores a dataset, once, into the sparse cache.

    xinslm cache TEACHER --data-path data --output-dir cache

This module opens the teacher and chooses the `Scorer`; `write.py` writes the shards.
"""

from pathlib import Path

from xinslm.alignment.byte_prefix import PrefixAligner
from xinslm.alignment.choose import kind_of, relate
from xinslm.cache.bucket_entries import GROUPS, GroupScorer
from xinslm.cache.config import CacheConfig, head_size
from xinslm.cache.encoder_scorer import EncoderScorer, empty_format
from xinslm.cache.entries import (
    CacheFormat,
)
from xinslm.cache.projected_states import SketchFormat
from xinslm.cache.scorers import DenseScorer, Scorer
from xinslm.cache.support import read_support
from xinslm.cache.write import CacheResult, cache_plan, write_cache
from xinslm.data.dataset import Dataset, open_dataset, require_tokenizer
from xinslm.device import pick_device
from xinslm.errors import UsageError
from xinslm.model.files import require_context
from xinslm.progress import Listener, ignore
from xinslm.teachers.base import HiddenTeacher
from xinslm.teachers.encoder import EncoderTeacher, find_encoder
from xinslm.teachers.endpoint import EndpointTeacher, is_endpoint
from xinslm.teachers.open import open_teacher
from xinslm.tokenizer.load import load_tokenizer


def run(
    config: CacheConfig, on_progress: Listener = ignore, api_key: str | None = None
) -> CacheResult:
    """Score both splits of a dataset with a teacher; `api_key` is for one behind a URL.

    Raises UsageError where no way leads from the teacher's tokenizer to the dataset's, and for an
    output folder that holds something else; XinslmError for a teacher that yields numbers that are
    not finite.
    """
    config.check()
    dataset = open_dataset(config.data_path)
    if config.adapter is not None and find_encoder(config.teacher) is not None:
        raise UsageError(
            f"--adapter is for language models, and {config.teacher} is an encoder. Leave it out"
        )
    if is_endpoint(config.teacher) and config.adapter is None:
        return _run_endpoint(config, dataset, api_key, on_progress)
    if (encoder := find_encoder(config.teacher)) is not None:
        return _run_encoder(config, dataset, encoder, on_progress)
    teacher = open_teacher(
        config.teacher,
        config.dtype,
        pick_device(config.device),
        config.revision,
        config.trust_remote_code,
        config.tokenizer,
        adapter=config.adapter,
    )
    assert not isinstance(teacher, EndpointTeacher), "these went another way"
    require_context(config.max_seq_length, teacher.max_length, f"teacher {config.teacher}")
    support = read_support(dataset)
    way = relate(
        dataset, teacher, config.alignment, bool(config.sketch_depths) or support is not None
    )
    vocab_size = dataset.manifest["vocab_size"]
    head = min(
        head_size(config.head, config.draws) if support is None else support.head, vocab_size - 1
    )
    fmt = CacheFormat(vocab_size, head, config.draws, config.temperature)
    sketches = _sketches(config, teacher) if config.sketch_depths else None
    scorer: Scorer
    if isinstance(way, PrefixAligner):
        fmt = CacheFormat(vocab_size, min(config.head or GROUPS, vocab_size - 1), 0, 1.0)
        scorer = GroupScorer(teacher, way, config, fmt.head)
    else:
        scorer = DenseScorer(teacher, way, fmt, config, sketches, support)
    plan = cache_plan(config, dataset, teacher, fmt, scorer, sketches, kind_of(way))
    return write_cache(config, dataset, plan, scorer, on_progress)


def _run_endpoint(
    config: CacheConfig, dataset: Dataset, api_key: str | None, on_progress: Listener
) -> CacheResult:
    """Let a server score the documents, if it can."""
    from xinslm.cache.endpoint_scorer import EndpointScorer, endpoint_format

    if config.sketch_depths:
        raise UsageError(
            "an endpoint gives no hidden states: leave sketch_depths out, or cache "
            "from the model's files"
        )
    fmt = endpoint_format(dataset.manifest["vocab_size"], head_size(config.head, 0))
    teacher = EndpointTeacher(config.teacher, config.endpoint, fmt.head, config.tokenizer, api_key)
    teacher.require_scoring()
    require_tokenizer(dataset, teacher.tokenizer.fingerprint(), f"teacher {teacher.name}")
    scorer = EndpointScorer(teacher, fmt, config.max_seq_length)
    plan = cache_plan(config, dataset, teacher, fmt, scorer)
    return write_cache(config, dataset, plan, scorer, on_progress)


def _run_encoder(
    config: CacheConfig, dataset: Dataset, folder: Path, on_progress: Listener
) -> CacheResult:
    """Score with a teacher that gives hidden states only."""
    if not config.sketch_depths:
        raise UsageError(
            f"{config.teacher} is an encoder: it gives hidden states, no next tokens. Say which "
            "depths to keep, with "
            f"--sketch-depths 1.0 for its last block"
        )
    teacher = EncoderTeacher(config.teacher, folder, config.dtype, pick_device(config.device))
    fmt = empty_format(dataset.manifest["vocab_size"])
    sketches = _sketches(config, teacher, alone=True)
    student = load_tokenizer(dataset.folder / "tokenizer")
    scorer = EncoderScorer(teacher, student, fmt, sketches, config)
    plan = cache_plan(config, dataset, teacher, fmt, scorer, sketches)
    return write_cache(config, dataset, plan, scorer, on_progress)


def _sketches(
    config: CacheConfig, teacher: HiddenTeacher | EncoderTeacher, alone: bool = False
) -> SketchFormat:
    return SketchFormat.of(
        config.sketch_depths, teacher.num_layers, teacher.hidden_size, config.sketch_width, alone
    )
