"""Small changes to a piece of code, one at a time, for tests/mutate.py: what they are, and the changed code.

Not a test file. A mutant is known by its number, which depends on the source and on this file alone.
"""

import ast
from collections.abc import Iterator
from typing import NamedTuple

BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
          ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult}
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
           ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
SYMMETRIC = {"min", "max", "promote_types", "transpose"}  # the first two arguments may change places
UNORDERED = {"isinstance", "mean", "var", "std"}          # so may the kinds or dimensions of a tuple given to these
SKIPPED = (ast.Raise, ast.Import, ast.ImportFrom)  # error messages; what is imported is noticed at once


class Mutant(NamedTuple):
    number: int
    line: int
    what: str                           # "operator: a + b -> a - b"
    function: tuple[int, int] | None    # first and last line of the innermost function; None: it runs at import


class Change(NamedTuple):
    what: str
    field: str      # of the node
    value: object   # its new value


def changes(node: ast.AST) -> list[Change]:
    """Every change to this one node."""
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return [Change("operator", "op", BINARY[type(node.op)]())]
    if isinstance(node, ast.AugAssign) and type(node.op) in BINARY:
        return [Change("operator", "op", BINARY[type(node.op)]())]
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        return [Change("comparison", "ops", [COMPARE[type(node.ops[0])](), *node.ops[1:]])]
    if isinstance(node, ast.BoolOp):
        return [Change("and/or", "op", ast.Or() if isinstance(node.op, ast.And) else ast.And())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [Change("sign", "op", ast.UAdd())]
    if isinstance(node, (ast.IfExp, ast.If, ast.While)):
        return [Change("condition", "test", negated(node.test))]
    if isinstance(node, ast.comprehension) and node.ifs:
        return [Change("condition", "ifs", [negated(node.ifs[0]), *node.ifs[1:]])]
    if isinstance(node, ast.Call) and len(node.args) > 1 and called(node) not in SYMMETRIC:
        return [Change("argument order", "args", [node.args[1], node.args[0], *node.args[2:]])]
    if isinstance(node, (ast.List, ast.Tuple)) and len(node.elts) > 1 and isinstance(node.ctx, ast.Load):
        return [Change("element order", "elts", [node.elts[1], node.elts[0], *node.elts[2:]])]
    if isinstance(node, ast.Constant):
        return [Change("constant", "value", value) for value in other_constants(node.value)]
    return []


def negated(test: ast.expr) -> ast.expr:
    return test.operand if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) else \
        ast.UnaryOp(ast.Not(), test)


def other_constants(value) -> list:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [value * 1.5 + 0.1]
    return [value + "X"] if isinstance(value, str) and " " not in value else []  # with blanks it is prose: a help text


def code_nodes(tree: ast.AST, function: tuple[int, int] | None = None) -> Iterator[tuple[ast.AST, tuple | None]]:
    """(node, lines of its function) of all that computes: no docstrings, annotations, imports, decorators, type
    aliases or error messages."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, SKIPPED) or is_docstring(child) or is_alias(child):
                continue
            # defaults of arguments are computed where the function is defined
            inside = function if field != "body" or not isinstance(tree, FUNCTIONS) else (tree.lineno, tree.end_lineno)
            if not (isinstance(child, ast.Tuple) and (isinstance(tree, ast.Compare) or called(tree) in UNORDERED)):
                yield child, inside  # x in (a, b) has no order either
            yield from code_nodes(child, inside)


def called(node: ast.AST) -> str:
    """The name of the function that a call calls; "" for what is no call."""
    function = getattr(node, "func", None)
    return getattr(function, "id", getattr(function, "attr", ""))


def is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def is_alias(node: ast.AST) -> bool:
    """Attend = Callable[...], KV = dict[...]: a type."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, (ast.Subscript, ast.BinOp)):
        return False
    name, of = getattr(node.targets[0], "id", "x"), getattr(getattr(node.value, "value", None), "id", "")
    return name[0].isupper() and (not name.isupper() or of in ("dict", "tuple", "list"))


def each(tree: ast.Module) -> Iterator[Mutant]:
    """Every mutant of a file. While one is handed out, the tree is that mutant."""
    number = 0
    for node, function in list(code_nodes(tree)):
        for what, field, new in changes(node):
            old, before = getattr(node, field), text(node)
            setattr(node, field, new)
            ast.fix_missing_locations(tree)
            if text(node) != before:
                yield Mutant(number, getattr(node, "lineno", 1), f"{what}: {before} -> {text(node)}", function)
                number += 1
            setattr(node, field, old)


def text(node: ast.AST) -> str:
    """A statement's first line: what is changed of an `if` is its condition."""
    if isinstance(node, ast.comprehension):
        return " if ".join(map(ast.unparse, [node.target, *node.ifs]))
    return ast.unparse(node).partition("\n")[0]


def mutated(source: str, number: int) -> ast.Module:
    """The code of one mutant, with the lines of the original."""
    tree = ast.parse(source)
    next(mutant for mutant in each(tree) if mutant.number == number)
    return tree
