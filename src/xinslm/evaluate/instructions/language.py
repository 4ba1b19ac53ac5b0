"""Which language a response is in, by the package langdetect, which IFEval uses.

xinslm does not install it. Checks that need it raise `LanguageUnavailableError` without it; their
instructions are then reported as not checked. langdetect draws random numbers; here each text has
the same seed, so the same text always gives the same language. The harness sets no seed: texts of
a few words may change there from run to run.
"""

import functools
from importlib.util import find_spec
from typing import Any

from xinslm.errors import XinslmError

_LANGUAGES = """
    af ar bg bn ca cs cy da de el en es et fa fi fr gu he hi hr hu id it ja kn ko lt lv mk ml mr
    ne nl no pa pl pt ro ru sk sl so sq sv sw ta te th tl tr uk ur vi zh-cn zh-tw
"""
LANGUAGES = frozenset(_LANGUAGES.split())
"""The languages of langdetect 1.0.9, as ISO 639-1 codes."""

_SEED = 0


class LanguageUnavailableError(XinslmError):
    """langdetect is not installed."""


def is_available() -> bool:
    """Return whether langdetect can be imported."""
    return find_spec("langdetect") is not None


def is_language(text: str, code: str) -> bool:
    """Return whether a text is in a language; true if it has nothing to tell a language by, as in
    IFEval.
    """
    if not is_available():
        raise LanguageUnavailableError(
            "the language of a text needs the package langdetect: pip install langdetect"
        )
    from langdetect import LangDetectException

    detector = _factory().create()
    detector.seed = _SEED
    detector.append(text)
    try:
        return bool(detector.detect() == code)
    except LangDetectException:
        return True


@functools.cache
def _factory() -> Any:
    """Load langdetect's profiles once, apart from its own global factory."""
    from langdetect import PROFILES_DIRECTORY, DetectorFactory

    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    return factory
