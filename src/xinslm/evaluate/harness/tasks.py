"""Tasks of lm-evaluation-harness by name, from its own definitions, without its slow start.

The harness reads all of its 14,000 task files first (15 s). Here only the folders that a name
points to are read; `start.py` and `prepared.py` have what else shortens the start. What the tasks
ask and how they score stays the harness's own code.
"""

import contextlib
import io
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError
from xinslm.evaluate.harness.local_data import local_datasets
from xinslm.evaluate.harness.start import (
    DATASETS,
    LateModule,
    late_modules,
    no_collection,
    quick_templates,
)

FEWSHOT_SEED = 1234
"""The harness's own."""


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks and the groups that they form."""

    tasks: dict[str, Any]
    """The harness's `Task` by name."""
    groups: dict[str, list[str]]
    """Tasks of each group, such as the 57 of mmlu."""
    files: dict[str, str]
    """SHA-256 of the local files that were read, by name."""


def load_tasks(names: Sequence[str], data: Path | None = None) -> LoadedTasks:
    """Load tasks and groups by the harness's names, or by the path of a task's YAML file.

    Args:
        names: Such as "hellaswag" or "mmlu:5"; the number is that of examples in the prompt, for
            tasks that do not fix it.
        data: Folder with their data (`local_data.py`); without it they come from the Hub.

    UsageError for an unknown task, data that is missing, or examples that the data does not have.
    """
    shots = {name: number for name, number in map(_parse, names)}
    names = list(shots)
    with late_modules(), quick_templates(), quiet(), no_collection():
        manager = _manager(names)
        with contextlib.ExitStack() as stack:
            local = None if data is None else stack.enter_context(local_datasets(data, late=True))
            try:
                loaded = manager.load(list(names))
            except (UsageError, XinslmError):
                raise
            except (OSError, ValueError, KeyError) as error:
                raise XinslmError(_load_error(names, data, error)) from error
    groups = {
        name: [task.task_name for task in group.get_all_tasks()]
        for name, group in loaded["groups"].items()
    }
    for name, task in loaded["tasks"].items():
        asked = [shots[n] for n in shots if n == name or name in groups.get(n, ())]
        _set_fewshot(name, task, asked[0] if asked else None)
    return LoadedTasks(loaded["tasks"], groups, local.used if local else {})


def num_docs(task: Any) -> int:
    """Number of items of a task."""
    return len(_docs(task))


def build_requests(task: Any, numbers: Sequence[int], lm: Any = None) -> list[Any]:
    """The requests of items `numbers` of a task, or of all if the prompt of an item depends on
    those before it; as chats if `lm` is given.
    """
    docs = _docs(task)
    with quick_templates(), quiet():
        if _draws_examples(task) or len(numbers) == len(docs):
            items = list(enumerate(docs))
            task.set_fewshot_seed(seed=FEWSHOT_SEED)  # each model gets the same examples
        else:
            items = list(zip(numbers, _rows(docs, numbers), strict=True))
        task.doc_iterator = lambda **ignored: iter(items)
        chat = {} if lm is None else {"apply_chat_template": True, "fewshot_as_multiturn": True}
        task.build_all_requests(
            chat_template=None if lm is None else lm.apply_chat_template,
            tokenizer_name="" if lm is None else lm.tokenizer_name,
            **chat,
        )
    return list(task.instances)


def _docs(task: Any) -> Any:
    """The items of a task; the harness keeps them, and would prepare them again in `eval_docs`."""
    return task.task_docs if hasattr(task, "task_docs") else task.eval_docs


def _rows(docs: Any, numbers: Sequence[int]) -> Any:
    """Items by their numbers; a dataset and rows that are prepared late give them at once."""
    return docs.select(numbers) if hasattr(docs, "select") else [docs[n] for n in numbers]


def _draws_examples(task: Any) -> bool:
    """Whether the examples in the prompts come from one random sequence."""
    from xinslm.evaluate.harness.library import FirstNSampler

    return bool(task.get_config("num_fewshot")) and not isinstance(
        getattr(task, "sampler", None), FirstNSampler
    )


def _parse(name: str) -> tuple[str, int | None]:
    """A task's name and its number of examples, from "mmlu:5"."""
    task, colon, number = name.rpartition(":")
    if not colon:
        return name, None
    if not number.isdecimal():
        raise UsageError(f"task {name}: write the number of examples after the colon, as in mmlu:5")
    return task, int(number)


def _manager(names: Sequence[str]) -> Any:
    """A `TaskManager` that knows `names`; UsageError if there is no such task."""
    import lm_eval

    from xinslm.evaluate.harness.library import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    folders = {folder for name in names for folder in _folders(root, name)}
    manager = TaskManager(include_defaults=False, include_path=[str(f) for f in sorted(folders)])
    known = set(manager.all_tasks)
    if not all(name in known or Path(name).suffix == ".yaml" for name in names):
        manager = TaskManager()
        known = set(manager.all_tasks)
    for name in names:
        if Path(name).suffix == ".yaml":
            if not Path(name).is_file():
                raise UsageError(f"{name}: there is no such file")
        elif name not in known:
            raise UsageError(
                f"there is no task '{name}' in lm-evaluation-harness{_like(name, known)}"
            )
    return manager


def _folders(root: Path, name: str) -> list[Path]:
    """Folders of task files whose names begin a task's name: arc for arc_easy."""
    words = name.split("_")
    names = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    for folder in (root / n for n in names):
        if folder.is_dir():
            default = folder / "default"
            return [default if default.is_dir() else folder]
    return []


def _like(name: str, known: set[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 3)
    return f"; did you mean {', '.join(near)}?" if near else "; `lm-eval ls tasks` lists them"


def _load_error(names: Sequence[str], data: Path | None, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    hint = "give a folder with their files as --data" if data is None else f"look at {data}"
    return f"the data of {', '.join(names)} cannot be loaded: {first}. Go online, or {hint}"


def _set_fewshot(name: str, task: Any, number: int | None) -> None:
    """Set the number of examples, as `lm_eval.simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    if number is not None and own != 0:
        task.set_config(key="num_fewshot", value=number)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    wanted = task.get_config("num_fewshot")
    if wanted:
        have = len(list(task.fewshot_docs() or []))
        if have < wanted:
            raise UsageError(
                f"{name} needs {wanted} examples for its prompts, but its data has {have} of "
                f"them; add the file of that split, or ask for {name}:0"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines of the harness inside."""
    level, bars = logging.getLogger("lm_eval").level, _progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if bars is not None:
        bars.disable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.getLogger("lm_eval").setLevel(level)
        if bars is not None:
            bars.enable_progress_bars()


def _progress_bars() -> Any:
    """`datasets`, if it is imported and shows progress bars."""
    library = sys.modules.get(DATASETS)
    if library is None or isinstance(library, LateModule):
        return None
    return None if library.are_progress_bars_disabled() else library
