"""Plugins of pytest for tests/mutate.py: which lines of a file each test reaches; some tests alone, in a given order.

Not a test file.
"""

import contextlib
import sys
import time
from pathlib import Path

import pytest


class Reach:
    """A pytest plugin that notes which lines of one file each test reaches, its fixtures included, and its seconds."""

    def __init__(self, path: Path):
        self.path, self.lines, self.fixtures = str(path), set(), {}
        self.found: dict[str, tuple[float, list[int]]] = {}

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename != self.path:
            return None
        self.lines.add(frame.f_lineno)
        return self.trace

    @contextlib.contextmanager
    def noting(self):
        """The lines reached meanwhile; what is around it has reached them, too."""
        outer, self.lines = self.lines, set()
        sys.settrace(self.trace)
        try:
            yield self.lines
        finally:
            outer |= self.lines
            self.lines = outer

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        with self.noting() as lines:
            result = yield
        self.fixtures[fixturedef] = lines
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        start = time.perf_counter()
        with self.noting() as lines:
            result = yield
        shared = [self.fixtures.get(fixture, set()) for name in item.fixturenames
                  for fixture in item._fixtureinfo.name2fixturedefs.get(name, ())]
        self.found[item.nodeid] = (time.perf_counter() - start, sorted(lines.union(*shared)))
        return result


class Only:
    """A pytest plugin that runs the tests of a list, in its order."""

    def __init__(self, tests: list[str]):
        self.rank = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])
