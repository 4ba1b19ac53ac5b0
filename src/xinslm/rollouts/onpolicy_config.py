"""Configuration of `onpolicy`."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from xinslm.inference.config import EngineName
from xinslm.losses.config import LossConfig
from xinslm.ranges import POSITIVE, SHARE, Dtype, Range, range_errors
from xinslm.sampling import Sampling
from xinslm.train.config import TrainingConfig

_ON_POLICY = {
    "rounds": Range(1, 10_000),
    "completions": Range(1, 10_000_000),
    "prompt_tokens": Range(1),
    "max_new_tokens": Range(1),
    "temperature": POSITIVE,
    "top_k": Range(0),
    "top_p": Range(0, 1, above=True),
    "generation_batch_size": Range(1, 100_000),
    "support_top_k": Range(1, 200),
    "num_epochs": Range(0, 2, above=True),
    "mix_share": Range(0, 1, above=True, below=True),
    "off_policy_share": SHARE,
    "contrast_start": Range(0, above=True),
    "contrast_end": Range(0, above=True),
}


def _reverse() -> LossConfig:
    return LossConfig(alpha=0.0, beta=1.0, divergence="reverse_kl")


@dataclass(frozen=True, kw_only=True)
class OnPolicyConfig(TrainingConfig):
    """Train a student, in rounds, on texts that it generates and a teacher scores."""

    student: Path
    """Student to start from: any LLaMA, Mistral, Qwen2 or Qwen3, also a quantized folder or a GGUF
    file.
    """
    teacher: str
    """Teacher: any model with the student's tokenizer."""
    prompts: Path
    """Dataset folder made by `xinslm prepare`. The prompt is the masked part before a chat's first
    answer, or the beginning of a plain text.
    """
    rounds: int = 4
    """Number of rounds: generate, score, train."""
    completions: int = 512
    """Texts to generate in each round."""
    prompt_tokens: int = 32
    """Prompt tokens from a plain text; at most half of it."""
    max_new_tokens: int = 128
    """Most tokens to generate after a prompt."""
    temperature: float = 1.0
    """Sampling temperature of the student; 1 samples its own distribution."""
    top_k: int = 0
    """Draw from this many of the most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens whose probabilities sum to this; 1 keeps all."""
    generation_batch_size: int | None = None
    """Texts generated in parallel; by default up to 128, as many as 2 GiB of keys and values allow.
    """
    support_top_k: int = 32
    """Number of the student's most likely tokens whose teacher probabilities are stored; the next
    token and 4 of the teacher's most likely are added.
    """
    num_epochs: float = 1.0
    """Passes over the texts of a round, at most 2: the texts become off-policy as the student
    changes.
    """
    mix_data: Path | None = None
    """Dataset to mix in: given texts or answers of a teacher. With --contrast, the teacher's
    answers.
    """
    mix_cache: Path | None = None
    """Its cache, made by `xinslm cache`."""
    mix_share: float = 0.25
    """Share of each step's rows that come from --mix-data."""
    off_policy_share: float = 0.0
    """Share of the rounds, from the start, that train on --mix-data alone: for a student far from
    its teacher.
    """
    contrast: bool = False
    """Raise the teacher's answers (--mix-data, skew KL) and lower the student's own (skew reverse
    KL), half of the rows each: DistiLLM-2 (arXiv:2503.07067).
    """
    contrast_start: float = 1.0
    """With --contrast, the initial weight of the student's own answers."""
    contrast_end: float = 1.5
    """With --contrast, the final weight of the student's own answers; it changes linearly."""
    learning_rate: float = 1e-4
    """Peak of the warmup-stable-decay schedule, which spans all rounds."""
    weight_decay: float = 0.0
    """Weight decay of the optimizer, on matrices only."""
    max_eval_samples: int = 64
    """Packed validation rows of --prompts to use at most after each round; 0 for all."""
    engine: EngineName = "auto"
    """What writes the student's texts. native: C++, weights and activations in 8 bits; pytorch:
    --compute-dtype. auto takes native where it can run the student on a CPU. Both models score the
    texts, and the student learns, in floats in any case.
    """
    teacher_dtype: Dtype = "auto"
    """Data type of the teacher; auto: float32, products in bfloat16 on CPUs with AMX."""
    trust_remote_code: bool = False
    """Run Python code from the teacher's repository."""
    seed: int = 0
    """Seed of prompts, sampling and row order."""
    loss: LossConfig = field(default_factory=_reverse)
    """The loss on the student's own texts. With --contrast only its skew is used."""
    mix_loss: LossConfig = field(default_factory=LossConfig)
    """The loss on --mix-data."""

    def errors(self) -> list[str]:
        """All errors, a sentence each."""
        wrong = [*super().errors(), *range_errors(self, _ON_POLICY), *self.loss.errors()]
        wrong += [error.replace("loss.", "mix_loss.") for error in self.mix_loss.errors()]
        if self.max_new_tokens >= self.max_seq_length:
            wrong.append(
                f"max_new_tokens ({self.max_new_tokens}) leaves no room for a prompt in rows of "
                f"{self.max_seq_length}"
            )
        if (self.mix_data is None) != (self.mix_cache is None):
            wrong.append("mix_data and mix_cache belong together: give both, or neither")
        if self.mix_data is None and self.contrast:
            wrong.append("contrast needs the teacher's answers: give mix_data and mix_cache")
        if self.mix_data is None and self.off_policy_share:
            wrong.append(
                "off_policy_share needs something to train on: give mix_data and mix_cache"
            )
        if not wrong and self.cold_rounds == self.rounds:
            wrong.append(
                f"off_policy_share {self.off_policy_share} leaves none of {self.rounds} rounds "
                "for the student's own "
                f"texts: lower it, or use `xinslm distill`"
            )
        if self.contrast and self.loss.temperature != 1:
            wrong.append("contrast compares at temperature 1: leave loss.temperature out")
        return wrong

    @property
    def cold_rounds(self) -> int:
        """Number of rounds, from the start, without texts of the student."""
        return round(self.off_policy_share * self.rounds)

    @property
    def losses(self) -> tuple[LossConfig, LossConfig]:
        """Losses on the student's own texts and on the mixed-in data."""
        if not self.contrast:
            return self.loss, self.mix_loss
        own = LossConfig(alpha=0.0, beta=1.0, divergence="skew_reverse_kl", skew=self.loss.skew)
        return own, replace(own, divergence="skew_kl")

    def sampling(self) -> Sampling:
        """Sampling settings of the student."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=0.0,
            seed=self.seed,
        )
