"""What shortens the start of lm-evaluation-harness without a change of its values.

Python code of a task is imported with the task, so TruthfulQA's mc2 brings a library for the
generated answers of another task. The harness compiles a template anew each time it fills one (30
times the cost of filling it). Reading JSON makes objects by the hundred thousand, and Python looks
through all of them for unused cycles again and again.
"""

import contextlib
import functools
import gc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

LATE_MODULES = ("rouge_score.rouge_scorer",)
"""What tasks import and most of them never use; this one needs NLTK, which imports SciPy and
scikit-learn: 1,200 modules, 1.7 s, 90 MB.
"""


class _LateFinder:
    """Finds the modules of `LATE_MODULES`; they run when something in them is first used."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in LATE_MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def late_modules() -> Iterator[None]:
    """Let imports inside put off the modules of `LATE_MODULES` until they are used."""
    finder = _LateFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextlib.contextmanager
def quick_templates() -> Iterator[None]:
    """Let the harness compile each template once inside."""
    from lm_eval import utils

    original = utils.env.from_string
    utils.env.from_string = functools.cache(original)
    try:
        yield
    finally:
        utils.env.from_string = original


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """No search for unused cycles of objects inside; for imports and for reading large files."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
