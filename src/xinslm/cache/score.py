"""The stage `cache`: a teacher scores a dataset, once, into the sparse cache.

    xinslm cache TEACHER --data-path data --output-dir cache

This module opens the teacher and chooses the `Scorer`; `write.py` writes the shards.
"""

from pathlib import Path

from xinslm.alignment.byte_prefix import BytePrefixAligner
from xinslm.alignment.choose import alignment_name, choose_alignment
from xinslm.cache.bucket_entries import DEFAULT_BUCKETS
from xinslm.cache.bucket_scorer import BucketScorer
from xinslm.cache.config import CacheConfig, default_top_k
from xinslm.cache.encoder_scorer import EncoderScorer, empty_format
from xinslm.cache.entries import CacheFormat
from xinslm.cache.projected_states import HiddenStateFormat
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
from xinslm.teachers.open import TeacherOptions, open_teacher
from xinslm.tokenizer.load import load_tokenizer


def run(
    config: CacheConfig, on_progress: Listener = ignore, api_key: str | None = None
) -> CacheResult:
    """Score both splits of a dataset with a teacher; `api_key` is for one behind a URL.

    Raises UsageError if the teacher's tokenizer cannot be aligned with the dataset's, or if the
    output folder holds something else; XinslmError if the teacher's numbers are not finite.
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
    options = TeacherOptions(
        dtype=config.dtype,
        device=pick_device(config.device),
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        adapter=config.adapter,
        tokenizer=config.teacher_tokenizer_path,
    )
    teacher = open_teacher(config.teacher, options)
    assert not isinstance(teacher, EndpointTeacher), "handled above"
    require_context(config.max_seq_length, teacher.max_length, f"teacher {config.teacher}")
    support = read_support(dataset)
    aligner = choose_alignment(
        dataset, teacher, config.alignment, bool(config.hidden_state_depths) or support is not None
    )
    vocab_size = dataset.manifest["vocab_size"]
    top_k = min(
        default_top_k(config.top_k, config.tail_sample_mass) if support is None else support.top_k,
        vocab_size - 1,
    )
    fmt = CacheFormat(vocab_size, top_k, config.tail_sample_mass, config.temperature)
    hidden_state_format = (
        _hidden_state_format(config, teacher) if config.hidden_state_depths else None
    )
    scorer: Scorer
    if isinstance(aligner, BytePrefixAligner):
        fmt = CacheFormat(
            vocab_size, min(config.top_k or DEFAULT_BUCKETS, vocab_size - 1), 0.0, 1.0
        )
        scorer = BucketScorer(teacher, aligner, config, fmt.top_k)
    else:
        scorer = DenseScorer(teacher, aligner, fmt, config, hidden_state_format, support)
    plan = cache_plan(
        config, dataset, teacher, fmt, scorer, hidden_state_format, alignment_name(aligner)
    )
    return write_cache(config, dataset, plan, scorer, on_progress)


def _run_endpoint(
    config: CacheConfig, dataset: Dataset, api_key: str | None, on_progress: Listener
) -> CacheResult:
    """Let a server score the documents, if it can."""
    from xinslm.cache.endpoint_scorer import EndpointScorer, endpoint_format

    if config.hidden_state_depths:
        raise UsageError(
            "an endpoint gives no hidden states: leave hidden_state_depths out, or cache "
            "from the model's files"
        )
    fmt = endpoint_format(dataset.manifest["vocab_size"], default_top_k(config.top_k, 0))
    teacher = EndpointTeacher(
        config.teacher, config.endpoint, fmt.top_k, config.teacher_tokenizer_path, api_key
    )
    teacher.require_scoring()
    require_tokenizer(dataset, teacher.tokenizer.fingerprint(), f"teacher {teacher.name}")
    scorer = EndpointScorer(teacher, fmt, config.max_seq_length)
    plan = cache_plan(config, dataset, teacher, fmt, scorer)
    return write_cache(config, dataset, plan, scorer, on_progress)


def _run_encoder(
    config: CacheConfig, dataset: Dataset, folder: Path, on_progress: Listener
) -> CacheResult:
    """Score with a teacher that gives hidden states only."""
    if not config.hidden_state_depths:
        raise UsageError(
            f"{config.teacher} is an encoder: it gives hidden states, no next tokens. Say which "
            "depths to keep, with "
            f"--hidden-state-depths 1.0 for its last block"
        )
    teacher = EncoderTeacher(config.teacher, folder, config.dtype, pick_device(config.device))
    fmt = empty_format(dataset.manifest["vocab_size"])
    hidden_state_format = _hidden_state_format(config, teacher, alone=True)
    student = load_tokenizer(dataset.folder / "tokenizer")
    scorer = EncoderScorer(teacher, student, fmt, hidden_state_format, config)
    plan = cache_plan(config, dataset, teacher, fmt, scorer, hidden_state_format)
    return write_cache(config, dataset, plan, scorer, on_progress)


def _hidden_state_format(
    config: CacheConfig, teacher: HiddenTeacher | EncoderTeacher, alone: bool = False
) -> HiddenStateFormat:
    return HiddenStateFormat.of(
        config.hidden_state_depths,
        teacher.num_layers,
        teacher.hidden_size,
        config.hidden_state_width,
        alone,
    )
