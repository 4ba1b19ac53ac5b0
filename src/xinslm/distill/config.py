"""Settings of `distill`."""

from dataclasses import dataclass, field
from pathlib import Path

from xinslm.cache.merge_config import weight_errors
from xinslm.distill.auxiliary_config import ContrastConfig, HiddenConfig
from xinslm.losses.config import LossConfig
from xinslm.ranges import Dtype
from xinslm.train.config import PretrainConfig


@dataclass(frozen=True, kw_only=True)
class DistillConfig(PretrainConfig):
    """Train a student from a teacher's cache, or from a live teacher."""

    cache: Path | None = None
    """Cache folder made by `xinslm cache` from the same dataset."""
    more_caches: tuple[Path, ...] = ()
    """Caches of the same dataset by other teachers, of any tokenizer: the divergence is the
    weighted mean of those from all caches.
    """
    cache_weights: tuple[float, ...] = ()
    """Weight of --cache, then of each of --more-caches; only ratios count. By default all the
    same.
    """
    teacher: str | None = None
    """Without a cache: live teacher, any model with the dataset's tokenizer. With
    one: the teacher that the cache must be of."""
    use_mock: bool = False
    """Train a small stand-in teacher on the data first and learn from it, to try the pipeline
    without a real teacher.
    """
    teacher_dtype: Dtype = "auto"
    """Type of a live teacher; auto: float32, products in bfloat16 on CPUs with AMX."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository brings."""
    hidden_states: Path | None = None
    """Another cache whose projected hidden states to match, such as an encoder's; by default
    those of --cache.
    """
    loss: LossConfig = field(default_factory=LossConfig)
    """The loss."""
    hidden: HiddenConfig = field(default_factory=HiddenConfig)
    """Matching of hidden states."""
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    """Contrast of hidden states."""

    def errors(self) -> list[str]:
        """What cannot work, a sentence each."""
        wrong = [
            *super().errors(),
            *self.loss.errors(),
            *self.hidden.errors(),
            *self.contrast.errors(),
        ]
        if self.hidden_states is not None and not (self.hidden.weight or self.contrast.weight):
            wrong.append(
                "hidden_states has no effect while hidden.weight and contrast.weight are 0: "
                "drop it, or set one"
            )
        wrong += self._cache_errors()
        if self.use_mock and (self.cache is not None or self.teacher is not None):
            wrong.append("use_mock trains a teacher of its own: drop it, or cache and teacher")
        elif not self.use_mock and self.cache is None and self.teacher is None:
            wrong.append(
                "give --cache (made by `xinslm cache`), --teacher, or --use-mock for a small "
                "stand-in teacher; to train without a teacher, use `xinslm pretrain`"
            )
        return wrong

    def _cache_errors(self) -> list[str]:
        """What is wrong with the list of caches."""
        if self.cache is None:
            several = bool(self.more_caches or self.cache_weights)
            return ["more_caches and cache_weights need --cache, the first one"] if several else []
        wrong, caches = [], [self.cache, *self.more_caches]
        if len({path.resolve() for path in caches}) < len(caches):
            wrong.append("cache and more_caches name one folder twice: give it a larger weight")
        if self.cache_weights and not self.more_caches:
            wrong.append("cache_weights has no effect without more_caches")
        elif self.cache_weights:
            wrong += weight_errors(self.cache_weights, len(caches), "cache_weights")
        return wrong

    def text_tokenizer(self) -> Path | None:
        """Tokenizer for raw text: by default the live teacher's."""
        if self.tokenizer_path is None and self.teacher is not None:
            return Path(self.teacher)
        return self.tokenizer_path

    def prepared_only(self) -> str | None:
        """Why `data_path` must be a prepared dataset; None if raw text will do."""
        return None if self.cache is None else "--cache needs the dataset that was cached"

    def hidden_depths(self) -> tuple[float, ...]:
        """Relative depths that the losses on hidden states need; none if they are off."""
        matched = self.hidden.depths if self.hidden.weight else ()
        if not self.contrast.weight:
            return matched
        return tuple(sorted({*matched, self.contrast.depth}))
