"""Finds and loads the library.

The environment decides: `XINSLM_NATIVE=off` never loads it, `XINSLM_NATIVE=require` makes its
absence an error, and `XINSLM_NATIVE_LIBRARY` names a file to load instead of the installed one, for
tests of other builds.
"""

import ctypes
import functools
import os
import sys
import sysconfig
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xinslm.errors import UsageError, XinslmError

ABI = 5
"""Interface number that this code is written for; `XL_ABI` in native/include/xinslm.h."""
_NAMES = {"win32": "xinslm.dll", "darwin": "libxinslm.dylib"}
MODES = ("auto", "off", "require")


def library() -> ctypes.CDLL | None:
    """Return the library, or None with `reason()`; XinslmError if it is required and absent."""
    mode = _mode()
    if mode == "off":
        return None
    found, problem = _loaded(os.environ.get("XINSLM_NATIVE_LIBRARY", ""))
    if found is None and mode == "require":
        raise XinslmError(
            f"XINSLM_NATIVE=require, but {problem}. Install a C++17 compiler and run "
            f"`pip install` again with -v, which shows what the build said"
        )
    return found


def reason() -> str:
    """Why there is no library; empty if there is one."""
    if _mode() == "off":
        return "XINSLM_NATIVE=off"
    return _loaded(os.environ.get("XINSLM_NATIVE_LIBRARY", ""))[1]


def wanted() -> bool:
    """Whether the environment lets the library be used."""
    return _mode() != "off"


def library_path() -> Path | None:
    """The file that is loaded; None if there is none."""
    found = library()
    return None if found is None else Path(found._name)


def free_with(owner: object, free: Callable[[Any], None], handle: Any) -> None:
    """Free what the library made when its owner in Python goes.

    Not when Python ends: a thread may be inside a call then, and the system takes all memory back.
    """
    weakref.finalize(owner, free, handle).atexit = False


def last_error(lib: ctypes.CDLL) -> str:
    """What the last failed call of this thread said."""
    text: bytes = lib.xl_last_error()
    return text.decode("utf-8", "replace")


def _mode() -> str:
    mode = os.environ.get("XINSLM_NATIVE", "auto")
    if mode not in MODES:
        raise UsageError(f"XINSLM_NATIVE is '{mode}', but must be one of {', '.join(MODES)}")
    return mode


@functools.cache
def _loaded(override: str) -> tuple[ctypes.CDLL | None, str]:
    """The library and an empty text, or None and why."""
    path = Path(override) if override else _installed()
    if path is None:
        return None, "the library was not built when xinslm was installed"
    try:
        lib = ctypes.CDLL(str(path))
        lib.xl_abi.restype = ctypes.c_int32
        lib.xl_last_error.restype = ctypes.c_char_p
        number = lib.xl_abi()
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}"
    if number != ABI:
        return None, f"{path} has interface {number}, not {ABI}; install xinslm again"
    return lib, ""


def _installed() -> Path | None:
    """The library of this installation: beside this file, or, of an editable one, among the
    environment's packages.
    """
    name = _NAMES.get(sys.platform, "libxinslm.so")
    places = [Path(__file__).parent, Path(sysconfig.get_path("platlib")) / "xinslm" / "native"]
    return next((place / name for place in places if (place / name).is_file()), None)
