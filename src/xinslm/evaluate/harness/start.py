"""What shortens the start of lm-evaluation-harness without a change of its values.

The harness imports libraries for work that most tasks never do: `datasets` reads rows that
`local_data.py` reads itself, sacrebleu and ROUGE score generated answers. They wait until they are
used. The harness compiles a template anew each time it fills one (30 times the cost of filling
it). Reading JSON makes objects by the hundred thousand, and Python looks through all of them for
unused cycles again and again.
"""

import contextlib
import functools
import gc
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

LATE_MODULES = ("rouge_score.rouge_scorer", "requests", "sacrebleu")
"""What the harness and its tasks import and most of them never use. The first needs NLTK, which
imports SciPy and scikit-learn: 1,200 modules, 1.7 s, 90 MB; the others 0.3 s and 21 MB.
"""
DATASETS = "datasets"
"""It waits as well (0.8 s, 97 MB with pyarrow and pandas), but its version, and its class in the
annotations of tasks, are asked for at once.
"""


class LateModule(ModuleType):
    """A module that runs when a name is asked for that it does not have.

    One from `importlib.util.LazyLoader` also runs when a second module imports it (Python 3.11
    looks at its `__spec__`). Names that were set before stay set, as they do there.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and isinstance(spec.loader, _LateLoader)
        given = {key: value for key, value in vars(self).items() if key not in spec.loader.first}
        object.__setattr__(self, "__class__", ModuleType)
        spec.loader = self.__loader__ = spec.loader.loader
        if spec.submodule_search_locations is not None:
            self.__path__ = list(spec.submodule_search_locations)
        spec.loader.exec_module(self)
        vars(self).update(given)
        if name == "__path__":
            sys.meta_path.insert(0, _ImportedFinder())
        return getattr(self, name)


class _LateLoader(importlib.machinery.SourceFileLoader):
    """Makes a `LateModule` of what `loader` loads."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader.name, loader.path)
        self.loader, self.first = loader, frozenset[str]()

    def exec_module(self, module: ModuleType) -> None:
        vars(module).pop("__path__", None)  # an import of a submodule asks for it
        if module.__name__ == DATASETS:
            version = importlib.metadata.version(DATASETS)
            vars(module).update(__version__=version, Dataset=LateClass)
        self.first = frozenset(vars(module))
        module.__class__ = LateModule


class _ImportedFinder:
    """Finds a submodule that its package has just imported, once.

    The import of a submodule asks for the path of its package and then runs the submodule, also if
    the package did so meanwhile.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        sys.meta_path.remove(self)
        if name not in sys.modules:
            return None
        self.spec = sys.modules[name].__spec__
        return importlib.machinery.ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


class _Forward(type):
    """Hands on to `datasets.Dataset` whatever is asked of a class."""

    def __getattr__(cls, name: str) -> Any:
        return getattr(_dataset_class(), name)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return _dataset_class()(*args, **options)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _dataset_class())


class LateClass(metaclass=_Forward):
    """`datasets.Dataset` in an annotation that was evaluated before the library was imported."""


def _dataset_class() -> Any:
    from datasets.arrow_dataset import Dataset

    return Dataset


class _LateFinder:
    """Finds what waits; it runs when something in it is first used."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in (*LATE_MODULES, DATASETS):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LateLoader(spec.loader)
        return spec


@contextlib.contextmanager
def late_modules() -> Iterator[None]:
    """Let imports inside put off `datasets` and the modules of `LATE_MODULES` until they are
    used.
    """
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
