"""xinslm: large open language models in, small ones that run on a laptop out.

Every stage is a function `run(config) -> result` in its own module, reads folders and writes one
folder; `xinslm.cli` only parses and prints. Importing the package is free: torch comes in with the
stage that needs it.
"""

__version__ = "0.1.0"
