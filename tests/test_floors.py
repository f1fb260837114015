"""Imports go downward only: the floors of docs/design.md, checked in the syntax tree of every module.

An import counts wherever it stands, inside a function too; `__main__.py` files are exempt.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("limoe_dist", "launch", "data_prep", "slurm")

# What each room may import of the project, besides itself.
BELOW_2 = ("limoe_dist.config", "limoe_dist.equations", "limoe_dist.parallel", "limoe_dist.data")
BELOW_3 = (*BELOW_2, "limoe_dist.model", "limoe_dist.optim", "limoe_dist.checkpoint")
BELOW_4 = (*BELOW_3, "limoe_dist.eval", "limoe_dist.analysis")
ALLOWED = {
    "limoe_dist.config": (),
    "limoe_dist.equations": (),
    "limoe_dist.parallel": ("limoe_dist.config",),
    "limoe_dist.data": ("limoe_dist.config",),
    "limoe_dist.model": ("limoe_dist.config", "limoe_dist.equations", "limoe_dist.parallel"),
    "limoe_dist.optim": ("limoe_dist.config", "limoe_dist.parallel"),
    "limoe_dist.checkpoint": ("limoe_dist.config", "limoe_dist.parallel"),
    "limoe_dist.eval": BELOW_3,
    "limoe_dist.analysis": BELOW_3,
    "limoe_dist.train": BELOW_4,
    "launch": (*BELOW_4, "limoe_dist.train", "slurm"),
    "slurm": ("limoe_dist.config", "limoe_dist.data.manifest"),
    "data_prep": ("limoe_dist.config", "limoe_dist.data"),
}
# Packages of others, for the rooms that name all that they may import.
FOREIGN = {"limoe_dist.config": {"pydantic"}, "limoe_dist.equations": {"torch"}}
# The entry point hands over to a command of another room, when that command is asked for.
LAZY = {("launch.cli", "data_prep.cli")}
# The order of the data and its manifest are read on machines without torch and DALI.
LIGHT = {"limoe_dist.data.manifest", "limoe_dist.data.mixture", "limoe_dist.data.order", "limoe_dist.data.places"}
HEAVY = {"torch", "nvidia"}


@dataclass(frozen=True)
class Import:
    names: tuple[str, ...]
    """What the statement may mean, longest first: `from a.b import c` is a.b.c or a.b."""
    line: int
    lazy: bool
    """Inside a function."""


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.AST, package: str) -> list[Import]:
    """All imports of a module in `package`, also importlib.import_module("...") and the attribute torch.distributed."""
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        found.extend(Import(names, node.lineno, lazy) for names in _imported(node, package))
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


def _imported(node: ast.AST, package: str) -> list[tuple[str, ...]]:
    match node:
        case ast.Import(names=names):
            return [(alias.name,) for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            above = package.split(".")[: len(package.split(".")) - level + 1] if level else []
            base = ".".join([*above, *([module] if module else [])])
            return [(f"{base}.{alias.name}", base) for alias in names]
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(value=str(text)), *_]):
            return [(text,)] if name in ("import_module", "__import__") else []
        case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
            return [("torch.distributed",)]
    return []


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(module: str) -> str | None:
    return next((room for room in ALLOWED if within(module, room)), None)


def wrong(module: str, imported: Import) -> str | None:
    """Why `module` must not import this, or None."""
    room, full = room_of(module), imported.names[0]
    top = full.partition(".")[0]
    if top == "tests":
        return "the project does not import its tests"
    if top in ROOMS:
        if room is None:
            return None if full == module else "it belongs to no floor"
        if any((module, name) in LAZY for name in imported.names) and imported.lazy:
            return None
        allowed = (room, *ALLOWED[room])
        if module in LIGHT:
            allowed = ("limoe_dist.config", *LIGHT)
        if any(within(name, other) for name in imported.names for other in allowed):
            return None
        return f"{room} may import {', '.join(ALLOWED[room]) or 'nothing else of the project'}"
    if within(full, "torch.distributed") and room == "limoe_dist.equations":
        return "equations run in one process"
    if room in FOREIGN and top not in FOREIGN[room] | sys.stdlib_module_names:
        return f"{room} may import {', '.join(FOREIGN[room])} and the standard library"
    if module in LIGHT and top in HEAVY:
        return f"it must load without {', '.join(sorted(HEAVY))}"
    return None


def source_files(root: Path) -> list[Path]:
    found = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    return [path for path in found if path.name != "__main__.py"]


def violations(root: Path) -> list[str]:
    """One line for each import that goes up or sideways."""
    lines = []
    for path in source_files(root):
        module = module_name(root, path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for imported in imports_of(ast.parse(path.read_text(encoding="utf-8")), package):
            if reason := wrong(module, imported):
                lines.append(
                    f"{path.relative_to(root)}:{imported.line}: {module} imports {imported.names[0]}: {reason}"
                )
    return lines


def test_imports_go_downward_only():
    assert violations(ROOT) == []


def test_every_room_has_a_floor():
    packages = {module_name(ROOT, path) for path in source_files(ROOT) if path.name == "__init__.py"}
    assert {"limoe_dist.equations", "launch", "data_prep"} <= packages
    assert [name for name in packages if room_of(name) is None] == ["limoe_dist"]


def test_the_data_package_loads_nothing_by_itself():
    assert (ROOT / "limoe_dist/data/__init__.py").read_text().strip() == ""


@pytest.mark.parametrize(
    ("module", "text", "imported"),
    [
        ("limoe_dist.config.schema", "import tyro", "tyro"),
        ("limoe_dist.config.schema", "from rich import print", "rich.print"),
        ("limoe_dist.config.schema", "import limoe_dist.data.manifest", "limoe_dist.data.manifest"),
        ("limoe_dist.equations.routing", "import numpy as np", "numpy"),
        ("limoe_dist.equations.routing", "import torch.distributed as dist", "torch.distributed"),
        ("limoe_dist.equations.routing", "from torch import Tensor, distributed", "torch.distributed"),
        ("limoe_dist.equations.routing", "import torch\nn = torch.distributed.get_rank", "torch.distributed"),
        ("limoe_dist.equations.routing", "from torch.distributed import get_rank", "torch.distributed.get_rank"),
        ("limoe_dist.equations.routing", "from limoe_dist import parallel", "limoe_dist.parallel"),
        ("limoe_dist.parallel.mesh", "def f():\n    from ..data import order", "limoe_dist.data.order"),
        ("limoe_dist.parallel.mesh", "from ..equations.routing import top_k", "limoe_dist.equations.routing.top_k"),
        ("limoe_dist.data.loader", "import limoe_dist.parallel.mesh", "limoe_dist.parallel.mesh"),
        ("limoe_dist.data.order", "import torch", "torch"),
        ("limoe_dist.data.manifest", "from limoe_dist.data.arrow import Reader", "limoe_dist.data.arrow.Reader"),
        ("limoe_dist.model.tower", "from limoe_dist.optim import zero", "limoe_dist.optim.zero"),
        ("limoe_dist.optim.zero", "from limoe_dist.equations import routing", "limoe_dist.equations.routing"),
        ("limoe_dist.checkpoint.reader", "import limoe_dist.model.tower", "limoe_dist.model.tower"),
        ("limoe_dist.eval.zeroshot", "import limoe_dist.train.step", "limoe_dist.train.step"),
        ("limoe_dist.analysis.report", "import limoe_dist.eval.zeroshot", "limoe_dist.eval.zeroshot"),
        ("limoe_dist.train.loop", "import launch.cli", "launch.cli"),
        ("limoe_dist.train.loop", "import tests.support.ranks", "tests.support.ranks"),
        (
            "data_prep.packing.pack",
            "from limoe_dist.data import manifest\nfrom limoe_dist.eval import embed",
            "limoe_dist.eval.embed",
        ),
        ("data_prep.packing.pack", "import importlib\nimportlib.import_module('limoe_dist.model')", "limoe_dist.model"),
        ("launch.cli", "import data_prep.cli", "data_prep.cli"),
        ("launch.plan", "def f():\n    import data_prep.cli", "data_prep.cli"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, module, text, imported):
    plant(tmp_path, module, text)
    (line,) = violations(tmp_path)
    assert f"{module} imports {imported}:" in line


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("limoe_dist.config.schema", "import json\nfrom pydantic import BaseModel\nfrom . import errors"),
        ("limoe_dist.equations.routing", "import torch.nn.functional as F\nfrom .dispatch import combine"),
        ("limoe_dist.parallel.mesh", "import torch.distributed as dist\nfrom limoe_dist.config import schema"),
        ("limoe_dist.data.order", "import numpy as np\nfrom limoe_dist.data import manifest"),
        ("limoe_dist.train.loop", "from limoe_dist.eval import zeroshot\nimport limoe_dist.data.loader"),
        ("data_prep.packing.pack", "from limoe_dist.data import manifest\nfrom data_prep.sources import local"),
        ("launch.cli", "def f():\n    from data_prep.cli import main\n    import data_prep.cli"),
        ("launch.__main__", "import data_prep.cli"),
    ],
)
def test_a_lawful_import_passes(tmp_path, module, text):
    plant(tmp_path, module, text)
    assert violations(tmp_path) == []


def plant(root: Path, module: str, text: str) -> None:
    path = root.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True)
    path.write_text(text + "\n")
