"""How tests/mutate.py runs a mutant: in a process forked from its own, where the mutant takes its module's place.

Not a test file.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import resource
import signal
from pathlib import Path

from mutants import mutated

TESTS_FOLDER = Path(__file__).parents[1]
PACKAGE = TESTS_FOLDER.parent / "isadca"
SECONDS = 240                # a mutant that takes longer counts as noticed: it hangs
MEMORY = 24 * 2**30          # of addresses: a mutant that wants more gets a MemoryError
QUIET = ["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", "--tb=no", "--disable-warnings"]


class Mutated(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module of isadca as its mutant."""

    def __init__(self, file: str, number: int):
        super().__init__(f"isadca.{file.removesuffix('.py').replace('/', '.')}", str(PACKAGE / file))
        self.number = number

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname):
        return compile(mutated(Path(self.path).read_text(encoding="utf-8"), self.number), self.path, "exec")


def forked(work: Path, body) -> int:
    """A child that calls `body(folder)` in silence and exits with what that returns. Returns its pid."""
    child = os.fork()
    if child:
        return child
    signal.alarm(10 * SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    status = 1
    try:
        status = body(work / str(os.getpid()))
    finally:
        os._exit(status)


def run_pytest(folder: Path, tests: list[str], *plugins) -> bool:
    """Whether all pass. Hypothesis does not look for a smaller failure: any will do."""
    import hypothesis
    import pytest
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", phases=phases, derandomize=True, database=None, deadline=None)
    hypothesis.settings.load_profile("mutants")
    paths = [str(TESTS_FOLDER / test) for test in tests]
    return pytest.main([*QUIET, f"--basetemp={folder}", *paths], plugins=list(plugins)) in (0, 5)
