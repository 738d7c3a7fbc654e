"""Mutation check: change the code in one small way at a time and see whether any test notices.

    python tests/mutate.py                       every file of TESTS
    python tests/mutate.py attention.py          one of them
    python tests/mutate.py --changed             the lines that differ from the last commit
    python tests/mutate.py --changed origin/main the lines that differ from there
    python tests/mutate.py --survivors           survivors that are not explained, once more, after tests were added
    python tests/mutate.py --table               what is known, without running anything
    python tests/mutate.py ddim.py --list        its mutants, without running anything

Each mutant runs in a process forked from this one, which has torch and the oracles loaded. A first run of a file's
tests, on the code as it is, sees which lines each test reaches and how long it takes; a mutant then meets the tests
that reach its line, the quickest first.

Verdicts are kept in tests/.mutants until the file or one of its tests changes, so that an interrupted run goes on where
it was. Survivors are printed with their line; those in tests/mutants_accepted.txt (file, line, mutant, reason) are
equivalent to the original or accepted.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent / "oracles"))

from forked import PACKAGE, SECONDS, Mutated, forked, run_pytest
from mutants import Mutant, each
from reach import Only, Reach

HERE = Path(__file__).parent
CACHE = HERE / ".mutants"
TESTS = {  # in this order: what notices most, and what is quick, first
    "attention.py": ["heart/test_attention.py", "heart/test_attention_identities.py", "heart/test_loop.py"],
    "ddim.py": ["heart/test_ddim.py", "heart/test_loop.py", "heart/test_reference.py"],
    "methods.py": ["heart/test_method.py", "heart/test_arguments.py", "heart/test_rival.py"],
    "reference.py": ["heart/test_arguments.py", "heart/test_reference.py", "heart/test_rival.py",
                     "heart/test_batches.py", "heart/test_own_ideas.py", "heart/test_finite.py"],
    "loop.py": ["heart/test_controls.py", "heart/test_loop.py", "heart/test_arguments.py", "heart/test_batches.py",
                "heart/test_rival.py", "heart/test_own_ideas.py", "heart/test_finite.py"],
    "common/masks.py": ["heart/test_own_ideas.py"],
    "speed/blend_isa.py": ["speed/test_blend_isa.py", "heart/test_attention.py", "heart/test_attention_identities.py"],
    "networks/ip_adapter.py": ["networks/test_ip_adapter.py", "networks/test_traps.py", "heart/test_loop.py"],
    "networks/patch_projections.py": ["networks/test_ip_adapter.py"],
    "networks/layers.py": ["networks/test_unet.py", "networks/test_sites.py", "networks/test_vae.py",
                           "networks/test_clip.py", "networks/test_traps.py", "networks/test_once.py"],
    "networks/unet.py": ["networks/test_unet.py", "networks/test_sites.py", "networks/test_residuals.py",
                         "networks/test_traps.py", "networks/test_once.py", "heart/test_rival.py"],
    "networks/vae.py": ["networks/test_vae.py", "networks/test_traps.py"],
    "networks/clip.py": ["networks/test_clip.py", "networks/test_traps.py"],
    "evaluation/metrics.py": ["evaluation/test_metrics.py", "common/test_images.py", "evaluation/test_judge.py"],
    "loading/layouts.py": ["loading/test_loading.py", "loading/test_checkpoints.py",
                           "loading/test_published_variants.py", "examples/test_kandinsky_prior.py",
                           "evaluation/test_judge.py"],
    "loading/original.py": ["loading/test_predictions.py", "loading/test_loading.py", "loading/test_checkpoints.py",
                            "loading/test_published_variants.py"],
    "loading/config_json.py": ["loading/test_config_json.py", "loading/test_published_variants.py",
                               "loading/test_bad_weights.py", "evaluation/test_judge.py"],
    "loading/checkpoints.py": ["loading/test_checkpoints.py", "loading/test_loading.py", "loading/test_load.py",
                               "loading/test_bad_weight_files.py", "loading/test_published_variants.py",
                               "loading/test_predictions.py"],
}


# ---- one mutant ---------------------------------------------------------------------------------------------------

def notices(folder: Path, file: str, mutant: Mutant, reach: dict) -> int:
    """Run on the mutant the tests that reach its line or, where none is seen to, its file. 1 if one fails."""
    signal.alarm(SECONDS)
    sys.meta_path.insert(0, Mutated(file, mutant.number))
    tests = met_by(mutant, reach)
    for path in TESTS[file]:
        some = sorted((test for test in tests if test.startswith(f"tests/{path}::")), key=lambda t: reach[t][0])
        if some and not run_pytest(folder, [path], Only(some)):
            return 1
    return 0


def met_by(mutant: Mutant, reach: dict) -> list[str]:
    """The tests that reach its line; all of them, where it runs at import or nothing else is seen to reach it."""
    found = [test for test, (_, lines) in reach.items() if mutant.function is None or mutant.line in lines]
    return found or list(reach)


# ---- what is known of a file -----------------------------------------------------------------------------------

def sha256(paths: list[Path]) -> str:
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()


class Known:
    """A file's mutants and the verdicts so far, kept in a file: first the hashes of code and tests and what the tests
    reach, then a line a mutant."""

    def __init__(self, file: str):
        self.file, self.source = file, (PACKAGE / file).read_text(encoding="utf-8")
        self.mutants = list(each(ast.parse(self.source)))
        self.path = CACHE / f"{file.replace('/', '.')}.jsonl"
        self.code = sha256([PACKAGE / file, HERE / "oracles/mutants.py"])
        self.tests = sha256([HERE / name for name in ["conftest.py", *TESTS[file]]])
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ["{}"]
        head, rows = json.loads(lines[0]), {row["number"]: row for row in map(json.loads, lines[1:])}
        same_code, same_tests = head.get("code") == self.code, head.get("tests") == self.tests
        self.reach = head["reach"] if same_code and same_tests else None
        self.verdicts = rows if same_code and same_tests else {}
        self.before = rows if same_code else {}

    def keep_settled(self) -> None:
        """What fewer tests noticed stays noticed, what is explained a survivor; the others are forgotten."""
        excuses, mutants = accepted(), {mutant.number: mutant for mutant in self.mutants}
        self.verdicts = {number: row for number, row in self.before.items()
                         if row["noticed"] or self.row(mutants[number]) in excuses}
        self.write()

    def measure(self, work: Path) -> None:
        """What each test reaches, unless it is known."""
        if self.reach is not None:
            return
        result = work / "reach.json"
        result.unlink(missing_ok=True)

        def body(folder):
            reach = Reach(PACKAGE / self.file)
            passed = run_pytest(folder, TESTS[self.file], reach)
            result.write_text(json.dumps(reach.found))
            return not passed
        if os.waitpid(forked(work, body), 0)[1]:
            sys.exit(f"mutate: the tests of {self.file} fail on the code as it is: pytest -x "
                     + " ".join(f"tests/{test}" for test in TESTS[self.file]))
        self.reach = json.loads(result.read_text())
        self.write()

    def write(self) -> None:
        CACHE.mkdir(exist_ok=True)
        head = {"code": self.code, "tests": self.tests, "reach": self.reach}
        rows = map(json.dumps, [head, *self.verdicts.values()])
        self.path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")

    def add(self, mutant: Mutant, noticed: bool, seconds: float) -> None:
        row = {"number": mutant.number, "noticed": noticed, "seconds": round(seconds, 2)}
        self.verdicts[mutant.number] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def row(self, mutant: Mutant) -> tuple[str, str, str]:
        """(file, text of the line, what was changed)."""
        return self.file, self.source.splitlines()[mutant.line - 1].strip(), mutant.what

    def survivors(self) -> list[Mutant]:
        return [mutant for mutant in self.mutants
                if mutant.number in self.verdicts and not self.verdicts[mutant.number]["noticed"]]


def accepted() -> dict[tuple[str, str, str], str]:
    """(file, text of the line, what was changed) -> why it may survive."""
    lines = (HERE / "mutants_accepted.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {(file, line, change): reason for file, line, change, reason in rows}


# ---- the command -----------------------------------------------------------------------------------------------

def changed_lines(revision: str) -> dict[str, set[int]]:
    """File of isadca -> its lines that the working tree has and the revision has not."""
    diff = subprocess.run(["git", "diff", "-U0", revision, "--", "isadca"], cwd=HERE.parent, capture_output=True,
                          text=True, check=True).stdout
    return lines_of_diff(diff)


def lines_of_diff(diff: str) -> dict[str, set[int]]:
    found, file = {}, None
    for line in diff.splitlines():
        if line.startswith("+++ "):
            file = line.removeprefix("+++ b/isadca/")
        elif hunk := re.match(r"@@ -\S+ \+(\d+)(?:,(\d+))? @@", line):
            first = int(hunk[1])
            found.setdefault(file, set()).update(range(first, first + int(hunk[2] or 1)))
    return found


def run(waiting: list[tuple[Known, Mutant]], jobs: int, work: Path) -> None:
    """Run mutants, several at once, and keep their verdicts; survivors are printed as they come."""
    from tqdm import tqdm
    excuses, running = accepted(), {}
    with tqdm(total=len(waiting), unit="mutant", smoothing=0, disable=None) as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                known, mutant = waiting.pop(0)
                known.measure(work)
                body = lambda folder: notices(folder, known.file, mutant, known.reach)
                running[forked(work, body)] = known, mutant, time.perf_counter()
            pid, status, _ = os.wait3(0)
            known, mutant, start = running.pop(pid)
            shutil.rmtree(work / str(pid), ignore_errors=True)
            known.add(mutant, status != 0, time.perf_counter() - start)
            bar.update()
            bar.set_postfix_str(known.file)
            if status == 0:
                row = known.row(mutant)
                bar.write("\t".join([str(mutant.line), *row, excuses.get(row, "NOT EXPLAINED")]))


def table(files: list[Known]) -> bool:
    """Print what is known. Whether all survivors are explained."""
    excuses, unexplained = accepted(), 0
    rows = [row for known in files for row in known.verdicts.values()]
    print("| file | mutants | noticed | survivors explained | of the rest noticed | not explained |")
    print("|---|---|---|---|---|---|")
    for known in files:
        done, left = len(known.verdicts), list(map(known.row, known.survivors()))
        if not done:
            continue
        open_ = Counter(row in excuses for row in left)
        unexplained += open_[False]
        ran = f"{done}" if done == len(known.mutants) else f"{done} of {len(known.mutants)}"
        rest = 1 - open_[False] / (done - open_[True])
        print(f"| {known.file} | {ran} | {1 - len(left) / done:.1%} | {open_[True]} | {rest:.1%} | {open_[False]} |")
        if done == len(known.mutants):
            for row in excuses.keys() - set(left):
                if row[0] == known.file:
                    print(f"no survivor any more, take it out of mutants_accepted.txt: {row}", file=sys.stderr)
    print(f"\n{len(rows):,} mutants; one after the other {sum(row['seconds'] for row in rows) / 3600:.1f} hours")
    return unexplained == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE")
    parser.add_argument("--changed", nargs="?", const="HEAD", metavar="REVISION")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    lines = changed_lines(args.changed) if args.changed else None
    files = args.files or [file for file in TESTS if lines is None or file in lines]
    known = [Known(file) for file in files]
    for one in known if args.survivors else ():
        one.keep_settled()
    chosen = [(one, mutant) for one in known for mutant in one.mutants
              if lines is None or mutant.line in lines.get(one.file, ())]
    if args.list:
        for one, mutant in chosen:
            print(one.file, mutant.line, mutant.what, sep="\t")
    elif args.table:
        table(known)
    else:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import diffusers  # noqa: F401 - loaded once, before the forks
        import hypothesis  # noqa: F401
        import pytest  # noqa: F401
        import skimage.metrics  # noqa: F401
        import torch
        import transformers  # noqa: F401
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as work:
            run([(one, mutant) for one, mutant in chosen if mutant.number not in one.verdicts], args.jobs, Path(work))
        sys.exit(not table(known))


if __name__ == "__main__":
    main()
