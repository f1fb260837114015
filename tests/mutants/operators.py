"""Mutation operators: every single small change of one module that should make a test fail.

A mutant replaces one range of the module's bytes; all other bytes stay as they are. Not mutated: docstrings,
annotations, imports, decorators, `assert`, arguments of `raise` and of warnings, f-strings, `__repr__`.
"""

from __future__ import annotations

import ast
import copy
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass

BINARY: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}
COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
CALLS = {
    one: other
    for pair in (
        ("max", "min"),
        ("amax", "amin"),
        ("argmax", "argmin"),
        ("maximum", "minimum"),
        ("sum", "mean"),
        ("any", "all"),
        ("zeros", "ones"),
        ("zeros_like", "ones_like"),
        ("floor", "ceil"),
        ("add_", "sub_"),
        ("mul_", "div_"),
        ("sqrt", "square"),
        ("normal", "uniform"),
        ("max_over", "sum_over"),
    )
    for one, other in (pair, pair[::-1])
}
"""Functions and methods that are called alike."""

SIBLINGS = [
    ("image", "text"),
    ("routed", "kept"),
    ("first", "second"),
    ("row", "column"),
    ("clean", "noisy"),
    ("up", "down"),
    ("weight", "bias"),
    ("start", "stop"),
    ("beta1", "beta2"),
    ("tp", "ep"),
    ("dp", "edp"),
    ("dp", "world"),
    ("width", "height"),
    ("found", "wanted"),
    ("one", "other"),
    ("before", "after"),
    ("rank", "size"),
    ("left", "right"),
]
"""Words in the names of variables and attributes that stand for two things of one kind."""

REMOVABLE = {
    *(
        "square",
        "sqrt",
        "rsqrt_",
        "abs",
        "exp",
        "exp_",
        "log",
        "neg",
        "round",
        "floor",
        "clamp",
        "clamp_",
        "nan_to_num",
    ),
    *("mul_", "add_", "sub_", "div_", "cumsum", "softmax", "log_softmax", "masked_fill", "flip", "sort", "unique"),
    *("t", "transpose", "unsqueeze", "squeeze", "squeeze_", "reshape", "view", "flatten", "expand", "clone"),
    *("float", "double", "long", "bfloat16", "to", "item", "lower", "strip"),
}
"""Methods that leave something of the same kind when their call is removed from a chain."""

COMMUTATIVE = {
    *("max", "min", "maximum", "minimum", "equal", "allclose", "isclose", "promote_types", "gcd"),
    *("isinstance", "getattr", "hasattr", "warn", "join"),
}
SILENT = {"warn", "print", "say", "log_line", "repr"}
"""Functions whose arguments are text for people."""
SAME_ON_CPU = {"device", "strict", "non_blocking", "pin_memory", "foreach", "fused", "use_reentrant"}
"""Keyword arguments that change no number on a CPU, or only guard against a defect elsewhere."""


@dataclass(frozen=True)
class Mutant:
    module: str
    """Path of the module from the root of the project."""
    start: int
    end: int
    """The bytes start:end are replaced."""
    new: str
    kind: str
    line: int

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.new.encode() + source[self.end :]

    def diff(self, source: bytes) -> str:
        """One line: where, the lines that are changed, and those lines as they are now."""
        first, last = source.rfind(b"\n", 0, self.start) + 1, source.find(b"\n", self.end)
        last = len(source) if last < 0 else last
        old, new = source[first:last], source[first : self.start] + self.new.encode() + source[self.end : last]
        return f"{self.module}:{self.line} [{self.kind}] - {_squeezed(old)} + {_squeezed(new)}"


def _squeezed(text: bytes) -> str:
    return " ".join(text.decode().split())


@dataclass(frozen=True)
class Signature:
    """What one function of the project can be called with."""

    positional: tuple[str, ...]
    required: frozenset[str]
    may_be_none: frozenset[str]


def signatures(sources: Iterator[bytes]) -> dict[str, Signature]:
    """The functions and dataclasses of the project by their bare names; the last one of a name wins."""
    found: dict[str, Signature] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[node.name] = _signature(node.args)
            elif isinstance(node, ast.ClassDef):
                inits = [x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__"]
                found[node.name] = _signature(inits[0].args) if inits else _fields(node)
    return found


def _signature(arguments: ast.arguments) -> Signature:
    positional = [*arguments.posonlyargs, *arguments.args]
    if positional and positional[0].arg in ("self", "cls", "ctx"):
        positional = positional[1:]
    defaults = len(arguments.defaults)
    required = {x.arg for x in positional[: len(positional) - defaults]}
    required |= {x.arg for x, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if not default}
    both = [*positional, *arguments.kwonlyargs]
    optional = {x.arg for x in both if x.annotation is not None and "None" in ast.unparse(x.annotation)}
    return Signature(tuple(x.arg for x in positional), frozenset(required), frozenset(optional))


def _fields(node: ast.ClassDef) -> Signature:
    fields = [x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
    names = [ast.unparse(x.target) for x in fields]
    required = {name for name, x in zip(names, fields, strict=True) if x.value is None}
    optional = {name for name, x in zip(names, fields, strict=True) if "None" in ast.unparse(x.annotation)}
    return Signature(tuple(names), frozenset(required), frozenset(optional))


def mutants_of(module: str, source: bytes, known: dict[str, Signature] | None = None) -> list[Mutant]:
    """All mutants of a module in the order of the file."""
    different: dict[tuple[int, int, str], Mutant] = {}
    for mutant in _Finder(module, source, known or {}).found():
        different.setdefault((mutant.start, mutant.end, mutant.new), mutant)
    return sorted(different.values(), key=lambda mutant: (mutant.start, mutant.end, mutant.new))


def changes_bytecode(mutant: Mutant, source: bytes) -> bool:
    """False for a mutant that compiles to the same bytecode, or does not compile: it says nothing about tests."""
    try:
        mutated = compile(mutant.apply(source), mutant.module, "exec")
    except (SyntaxError, ValueError):
        return False
    return _code(mutated) != _code(compile(source, mutant.module, "exec"))


def _code(code: types.CodeType) -> tuple[object, ...]:
    """What a code object does, without its line numbers."""
    constants = tuple(_code(x) if isinstance(x, types.CodeType) else (type(x), repr(x)) for x in code.co_consts)
    return code.co_code, code.co_names, code.co_varnames, constants


class _Finder:
    """Walks the syntax tree of one module and collects its mutants."""

    def __init__(self, module: str, source: bytes, known: dict[str, Signature]) -> None:
        self.module, self.source, self.known = module, source, known
        self.tree = ast.parse(source)
        self.line_starts = [0]
        for line in source.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))
        nodes = list(ast.walk(self.tree))
        self.imported = {
            (alias.asname or alias.name).split(".")[0]
            for node in nodes
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        self.names = {node.id for node in nodes if isinstance(node, ast.Name)}
        self.names |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        self.attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        self.attributes |= {
            node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }
        self.literals = self._literals(nodes)
        self.mutants: list[Mutant] = []

    @staticmethod
    def _literals(nodes: list[ast.AST]) -> list[list[str]]:
        """The alternatives of each Literal[...]."""
        return [
            [x.value for x in ast.walk(node.slice) if isinstance(x, ast.Constant) and isinstance(x.value, str)]
            for node in nodes
            if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal"
        ]

    def found(self) -> list[Mutant]:
        for statement in self.tree.body:
            self._statement(statement, set())
        return self.mutants

    def _range(self, node: ast.AST) -> tuple[int, int]:
        start = self.line_starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = self.line_starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        return start, end

    def _add(self, node: ast.AST, new: ast.AST | str, kind: str) -> None:
        start, end = self._range(node)
        text = new if isinstance(new, str) else ast.unparse(ast.fix_missing_locations(new))
        if isinstance(new, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp | ast.IfExp):
            text = f"({text})"
        self.mutants.append(Mutant(self.module, start, end, text, kind, node.lineno))  # type: ignore[attr-defined]

    def _replace(self, node: ast.AST, kind: str, **fields: object) -> None:
        changed = copy.copy(node)
        for name, value in fields.items():
            setattr(changed, name, value)
        self._add(node, changed, kind)

    # Statements

    def _body(self, statements: list[ast.stmt], assigned: set[str]) -> None:
        for statement in statements:
            self._statement(statement, assigned)

    def _statement(self, node: ast.stmt, assigned: set[str]) -> None:
        """assigned: names that have a value already in this function."""
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Assert | ast.Raise | ast.Global | ast.Nonlocal):
            return
        if isinstance(node, ast.FunctionDef):
            if node.name in ("__repr__", "__str__"):
                return
            arguments = node.args
            for default in [*arguments.defaults, *arguments.kw_defaults]:
                self._expression(default)
            names = {x.arg for x in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]}
            self._body(node.body, names)
            return
        if isinstance(node, ast.ClassDef):
            self._body(node.body, set())
            return
        if isinstance(node, ast.Expr):
            self._expression_statement(node)
            return
        if isinstance(node, ast.If | ast.While):
            if _name(node.test) == "TYPE_CHECKING" or "__name__" in ast.unparse(node.test):
                return
            self._condition(node.test, only_raises=len(node.body) == 1 and isinstance(node.body[0], ast.Raise))
        self._deletion(node, assigned)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "type_comment", "test") and field != "test":
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.stmt):
                    self._statement(child, assigned)
                elif isinstance(child, ast.expr):
                    self._expression(child)
                elif isinstance(child, ast.excepthandler | ast.match_case):
                    self._body(child.body, assigned)
                elif isinstance(child, ast.withitem):
                    self._expression(child.context_expr)
        for target in ast.walk(node):
            if isinstance(target, ast.Name) and isinstance(target.ctx, ast.Store):
                assigned.add(target.id)

    def _expression_statement(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant):
            return
        call = node.value
        if isinstance(call, ast.Call) and _name(call.func) in SILENT:
            return
        if not isinstance(call, ast.Yield | ast.YieldFrom | ast.Await):
            self._add(node, "pass", "delete statement")
        self._expression(call)

    def _deletion(self, node: ast.stmt, assigned: set[str]) -> None:
        if isinstance(node, ast.AugAssign):
            self._add(node, "pass", "delete statement")
            other = BINARY.get(type(node.op))
            if other is not None:
                self._replace(node, "arithmetic", op=other())
        elif isinstance(node, ast.Assign):
            targets = [x for target in node.targets for x in _flat(target)]
            if all(not isinstance(x, ast.Name) or x.id in assigned for x in targets):
                self._add(node, "pass", "delete statement")
        elif isinstance(node, ast.Break):
            self._add(node, "continue", "break/continue")
        elif isinstance(node, ast.Continue):
            self._add(node, "break", "break/continue")
            self._add(node, "pass", "break/continue")
        elif isinstance(node, ast.Return) and node.value is None:
            self._add(node, "pass", "delete statement")

    def _condition(self, test: ast.expr, *, only_raises: bool = False) -> None:
        self._add(test, "False", "condition")
        if not only_raises:
            self._add(test, "True", "condition")

    # Expressions

    def _expression(self, node: ast.AST | None) -> None:
        if node is None or isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.Call) and _name(node.func) in SILENT:
            return
        handler = getattr(self, f"_{type(node).__name__.lower()}", None)
        if handler is not None and handler(node):
            return
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr | ast.keyword | ast.comprehension | ast.Slice | ast.arguments):
                self._expression(child)

    def _constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._add(node, str(not value), "constant")
        elif isinstance(value, int):
            for other in (value + 1, value - 1) if value > 0 else (1,):
                self._add(node, str(other), "constant")
        elif isinstance(value, float):
            for other_float in _other_floats(value):
                self._add(node, f"({other_float!r})" if other_float < 0 else repr(other_float), "constant")
        elif isinstance(value, str) and value:
            for alternatives in self.literals:
                if value in alternatives:
                    other_text = alternatives[(alternatives.index(value) + 1) % len(alternatives)]
                    self._add(node, repr(other_text), "literal")
                    return
            self._add(node, repr(value + "_"), "string")

    def _unaryop(self, node: ast.UnaryOp) -> bool:
        if isinstance(node.op, ast.UAdd):
            return False
        operand = node.operand
        if isinstance(node.op, ast.USub) and isinstance(operand, ast.Constant) and isinstance(operand.value, int):
            # Without its minus the last dim of a matrix is the same dim.
            for other in (1 - operand.value, -operand.value - 1):
                self._add(node, str(other), "constant")
            return True
        self._add(node, operand, "unary removed")
        return False

    def _binop(self, node: ast.BinOp) -> None:
        other = BINARY.get(type(node.op))
        if other is not None and not isinstance(node.left, ast.JoinedStr) and not _is_text(node):
            self._replace(node, "arithmetic", op=other())

    def _boolop(self, node: ast.BoolOp) -> None:
        self._replace(node, "and/or", op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
        for number in range(len(node.values)):
            rest = node.values[:number] + node.values[number + 1 :]
            if len(rest) == 1:
                self._add(node, rest[0], "operand dropped")
            else:
                self._replace(node, "operand dropped", values=rest)

    def _compare(self, node: ast.Compare) -> None:
        for number, op in enumerate(node.ops):
            other = COMPARISONS[type(op)]()
            self._replace(node, "comparison", ops=[*node.ops[:number], other, *node.ops[number + 1 :]])

    def _ifexp(self, node: ast.IfExp) -> None:
        self._condition(node.test)

    def _comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._add(test, "True", "condition")

    def _slice(self, node: ast.Slice) -> None:
        for bound in ("lower", "upper"):
            value = getattr(node, bound)
            if value is None:
                continue
            self._replace(node, "slice bound", **{bound: None})
            if not isinstance(value, ast.Constant | ast.UnaryOp):
                moved = ast.BinOp(value, ast.Add() if bound == "lower" else ast.Sub(), ast.Constant(1))
                self._replace(node, "slice bound", **{bound: moved})

    def _subscript(self, node: ast.Subscript) -> None:
        index = node.slice
        if isinstance(index, ast.Name) and re.fullmatch(r"i|j|\w*(number|index|rank|place|start|step|group)", index.id):
            self._replace(node, "index", slice=ast.BinOp(index, ast.Sub(), ast.Constant(1)))

    def _name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            for other in _siblings(node.id, self.names):
                self._add(node, other, "sibling")

    def _attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load) and _name(node.value) not in self.imported:
            if node.attr == "T":
                self._add(node, node.value, "call removed")
            for other in _siblings(node.attr, self.attributes):
                self._replace(node, "sibling", attr=other)

    def _call(self, node: ast.Call) -> None:
        name = _name(node.func)
        on_value = isinstance(node.func, ast.Attribute) and _name(node.func.value) not in {*self.imported, "self"}
        if name in CALLS:
            func = copy.copy(node.func)
            setattr(func, "id" if isinstance(func, ast.Name) else "attr", CALLS[name])
            self._replace(node, "function", func=func)
        if name in REMOVABLE and on_value and isinstance(node.func, ast.Attribute):
            self._add(node, node.func.value, "call removed")
        self._arguments(node, name)

    def _arguments(self, node: ast.Call, name: str) -> None:
        signature = self.known.get(name)
        starred = any(isinstance(x, ast.Starred) for x in node.args)
        for number, keyword in enumerate(node.keywords):
            if keyword.arg is None or keyword.arg in SAME_ON_CPU:
                continue
            others = node.keywords[:number] + node.keywords[number + 1 :]
            needed = signature is not None and keyword.arg in signature.required
            if not needed and not name.startswith("clamp"):
                self._replace(node, "argument dropped", keywords=others)
            if keyword.arg in ("min", "max"):
                swapped = ast.keyword("max" if keyword.arg == "min" else "min", keyword.value)
                self._replace(node, "argument", keywords=[*others, swapped])
            may_be_none = signature is not None and keyword.arg in signature.may_be_none
            if (may_be_none or "valid" in keyword.arg) and not _is_none(keyword.value):
                none = ast.keyword(keyword.arg, ast.Constant(None))
                self._replace(node, "argument None", keywords=[*others, none])
        if starred:
            return
        for number, (one, other) in enumerate(zip(node.args, node.args[1:], strict=False)):
            if name not in COMMUTATIVE and ast.dump(one) != ast.dump(other):
                swapped_args = [*node.args[:number], other, one, *node.args[number + 2 :]]
                self._replace(node, "arguments swapped", args=swapped_args)
        for number, argument in enumerate(node.args):
            known = signature.positional[number : number + 1] if signature else ()
            optional = signature is not None and signature.may_be_none.issuperset(known) and bool(known)
            if (optional or _name(argument).startswith("valid")) and not _is_none(argument):
                given = [*node.args[:number], ast.Constant(None), *node.args[number + 1 :]]
                self._replace(node, "argument None", args=given)

    def _keyword(self, node: ast.keyword) -> bool:
        return node.arg in SAME_ON_CPU

    def _lambda(self, node: ast.Lambda) -> bool:
        self._expression(node.body)
        return True


def _name(node: ast.AST) -> str:
    """The last part of a name: `view` of x.view."""
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _flat(target: ast.expr) -> list[ast.expr]:
    return [x for part in target.elts for x in _flat(part)] if isinstance(target, ast.Tuple) else [target]


def _other_floats(value: float) -> tuple[float, ...]:
    if value == 0:
        return (1.0,)
    if abs(value) < 1e-5:  # an epsilon: twice as much is no difference that matters
        return 1000 * value, 0.0
    return 2 * value, 0.5 * value, -value


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(x, ast.Constant) and isinstance(x.value, str) for x in (node.left, node.right))


def _siblings(name: str, present: set[str]) -> Iterator[str]:
    """Names of the module that differ from this one in one word of a pair."""
    words = name.split("_")
    for one, other in SIBLINGS:
        for this, that in ((one, other), (other, one)):
            changed = "_".join(re.sub(rf"^{this}(s?)$", rf"{that}\1", word) for word in words)
            if changed != name and changed in present:
                yield changed
