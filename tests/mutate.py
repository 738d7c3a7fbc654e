"""Mutation check: change the code in one small way at a time and see whether any test notices.

    python tests/mutate.py                       all five files (tens of minutes on two cores)
    python tests/mutate.py attention.py          one of them
    python tests/mutate.py ddim.py --list        its mutants, without running anything

Each mutant runs in a forked process that has torch and the oracles loaded already. Survivors are printed with their
line; those in tests/mutants_accepted.txt (file, line, mutant, reason) are equivalent to the original or accepted.
"""

import argparse
import ast
import contextlib
import importlib.abc
import importlib.util
import io
import os
import signal
import sys
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parent / "isadca"
TESTS = {  # fastest first: the first failure ends a mutant
    "attention.py": ["heart/test_attention.py", "heart/test_attention_identities.py", "heart/test_loop.py",
                     "heart/test_batches.py"],
    "ddim.py": ["heart/test_ddim.py", "heart/test_reference.py"],
    "networks/ip_adapter.py": ["networks/test_ip_adapter.py", "networks/test_traps.py", "heart/test_loop.py"],
    "networks/patch_projections.py": ["networks/test_ip_adapter.py"],
    "loop.py": ["heart/test_loop.py", "heart/test_batches.py", "heart/test_rival.py", "app/test_cli.py"],
}
SECONDS = 240  # a mutant that takes longer counts as noticed: it hangs

BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
          ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}


def mutations(node: ast.AST) -> list[tuple[str, str, object]]:
    """(what it is, field, new value) of every change to this one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return [("operator", "op", BINARY[type(node.op)]())]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        return [("comparison", "ops", [COMPARE[type(node.ops[0])](), *node.ops[1:]])]
    if isinstance(node, ast.BoolOp):
        return [("and/or", "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        return [("sign", "op", ast.UAdd() if isinstance(node.op, ast.USub) else ast.Invert())]
    if isinstance(node, ast.IfExp):
        return [("condition", "test", ast.UnaryOp(ast.Not(), node.test))]
    if isinstance(node, ast.Call) and len(node.args) > 1:
        return [("argument order", "args", [node.args[1], node.args[0], *node.args[2:]])]
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) > 1 and isinstance(node.ctx, ast.Load):
        return [("element order", "elts", [node.elts[1], node.elts[0], *node.elts[2:]])]
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            return [("constant", "value", not value)]
        if isinstance(value, int):
            return [("constant", "value", value + 1), ("constant", "value", value - 1)]
        if isinstance(value, float):
            return [("constant", "value", value * 1.5 + 0.1)]
        if isinstance(value, str):
            return [("constant", "value", value + "X")]
    return []


def code_nodes(tree: ast.AST):
    """Nodes that compute: no docstrings, annotations, imports, decorators or error messages."""
    for field, value in ast.iter_fields(tree):
        children = value if isinstance(value, list) else [value]
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in children:
            docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if isinstance(child, ast.AST) and not docstring and not isinstance(child, (ast.Raise, ast.Import,
                                                                                      ast.ImportFrom)):
                aliases = isinstance(child, ast.Assign) and isinstance(child.value, (ast.Subscript, ast.BinOp)) \
                    and getattr(child.targets[0], "id", "x")[0].isupper()  # type aliases
                if not aliases:
                    if not (isinstance(tree, ast.Compare) and isinstance(child, ast.Tuple)):  # x in (a, b): no order
                        yield child
                    yield from code_nodes(child)


def mutants(source: str) -> list[tuple[int, str, str]]:
    """(line number, what was changed, mutated source) of every mutant of a file."""
    tree, found = ast.parse(source), []
    for node in code_nodes(tree):
        for what, field, new in mutations(node):
            old, before = getattr(node, field), ast.unparse(node)
            setattr(node, field, new)
            ast.fix_missing_locations(tree)
            if ast.unparse(node) != before:
                found.append((getattr(node, "lineno", 1), f"{what}: {before} -> {ast.unparse(node)}",
                              ast.unparse(tree)))
            setattr(node, field, old)
    return found


class Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives isadca.<name> the mutated source."""

    def __init__(self, file: str, source: str):
        self.name, self.source = f"isadca.{file.removesuffix('.py').replace('/', '.')}", source

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module):
        exec(compile(self.source, self.name, "exec"), module.__dict__)


def start(file: str, source: str) -> int:
    """Run the tests on the mutant in a forked child; its exit status is 0 if they all pass. Returns its pid."""
    child = os.fork()
    if child:
        return child
    signal.alarm(SECONDS)
    sys.meta_path.insert(0, Mutated(file, source))
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(io.StringIO()):
        import pytest
        quiet = ["-x", "-q", "-p", "no:cacheprovider"]
        noticed = any(pytest.main([*quiet, str(HERE / name)]) for name in TESTS[file])
    os._exit(noticed)


def survivors(file: str, found: list[tuple[int, str, str]], jobs: int):
    """The mutants of a file that no test notices, as they come."""
    running, waiting = {}, list(found)
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            running[start(file, mutant[2])] = mutant
        pid, status = os.wait()
        mutant = running.pop(pid)
        if status == 0:
            yield mutant


def accepted() -> dict[tuple[str, str, str], str]:
    """(file, text of the line, what was changed) -> why it may survive."""
    lines = (HERE / "mutants_accepted.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return {(file, line, change): reason for file, line, change, reason in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if not args.list:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import diffusers  # noqa: F401 - loaded once, before the forks
        import hypothesis  # noqa: F401
        import torch
        import transformers  # noqa: F401
        torch.set_num_threads(1)
    excuses, total, survived, unexcused = accepted(), 0, 0, 0
    for file in args.files:
        original = (PACKAGE / file).read_text(encoding="utf-8")
        found = mutants(original)
        total += len(found)
        for number, change, _ in found if args.list else survivors(file, found, args.jobs):
            line = original.splitlines()[number - 1].strip()
            reason = excuses.get((file, line, change))
            survived, unexcused = survived + 1, unexcused + (reason is None)
            print(f"{number}\t{file}\t{line}\t{change}\t{reason or 'NOT EXPLAINED'}", flush=True)
    if not args.list:
        print(f"{total} mutants, {total - survived} noticed ({1 - survived / total:.1%}), {survived} survived, "
              f"{unexcused} of them not explained")
        raise SystemExit(bool(unexcused))


if __name__ == "__main__":
    main()
