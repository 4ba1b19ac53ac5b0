"""How OpenMP's threads wait: read once, when PyTorch loads the library, so set before torch is
imported.

PyTorch's builds for Linux bring libgomp, whose threads spin for milliseconds at the end of every
parallel region. If another process needs the core, that spinning holds back the thread that has
work: training was up to ten times slower. Waiting passively costs an idle machine nothing that
`benchmarks/busy_neighbour.py` can measure.
"""

from collections.abc import MutableMapping

WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user chooses how threads wait: the standard's, libgomp's, LLVM's."""


def set_wait_policy(environ: MutableMapping[str, str]) -> None:
    """Let threads sleep while they wait, unless the user has chosen how."""
    if not any(name in environ for name in WAIT_SETTINGS):
        environ["OMP_WAIT_POLICY"] = "passive"
