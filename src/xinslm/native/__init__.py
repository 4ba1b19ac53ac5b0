"""The native library: found, loaded and checked once, through ctypes.

`library()` gives it or None, `reason()` says why there is none. Each function of the library has a
twin in Python that defines it and that serves where there is no library.
"""

from xinslm.native.load import library, library_path, reason, wanted

__all__ = ["library", "library_path", "reason", "wanted"]
