"""Tests of the native library; those that load it skip by name where it was not built."""

import pytest

from xinslm.native import library, reason

needs_library = pytest.mark.skipif(
    library() is None, reason=f"the native library is not there: {reason()}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/native/" in str(item.path) and not item.get_closest_marker("without_library"):
            item.add_marker(needs_library)
