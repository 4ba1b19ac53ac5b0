"""xinslm: large open language models in, small ones that run on a laptop out.

Every command of the tool is a configuration class, and `run` takes any of them:

    import xinslm
    xinslm.run(xinslm.PrepareConfig(data_path=("book.txt",), output_dir=Path("data")))

A stage reads folders and writes one folder; `xinslm.cli` only parses and prints. Importing the
package is free: torch comes in with the stage that needs it.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Load `run` and the configuration classes when they are asked for."""
    from xinslm.commands import config_classes, run

    if name == "run":
        return run
    if name in (classes := config_classes()):
        return classes[name].load("config")
    raise AttributeError(f"module {__name__} has no {name}")


def __dir__() -> list[str]:
    from xinslm.commands import config_classes

    return ["__version__", "run", *config_classes()]
