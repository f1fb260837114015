"""Operators and runner of mutation testing, on modules of a few lines."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent

import pytest

from tests.mutants import __main__ as command
from tests.mutants.modules import MODULES
from tests.mutants.operators import Mutant, changes_bytecode, mutants_of, signatures
from tests.mutants.running import ROOT, Outcome, Tree


def changes(text: str) -> set[str]:
    """`old -> new` of every mutant of a text, white space aside."""
    source = dedent(text).encode()
    found = mutants_of("m.py", source, signatures(iter([source])))
    return {f"{source[m.start : m.end].decode()} -> {m.new}" for m in found}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("y = a < b", {"a < b -> (a <= b)"}),
        ("y = a - b", {"a - b -> (a + b)"}),
        ("y = a // b", {"a // b -> (a * b)"}),
        ("y = 2", {"2 -> 3", "2 -> 1"}),
        ("y = 0", {"0 -> 1"}),
        ("y = 0.5", {"0.5 -> 1.0", "0.5 -> 0.25", "0.5 -> (-0.5)"}),
        ("y = 1e-8", {"1e-8 -> 1e-05", "1e-8 -> 0.0"}),
        ("y = True", {"True -> False"}),
        ("y = not a", {"not a -> a"}),
        ("y = x.sum(-1)", {"-1 -> 0", "-1 -> -2", "x.sum(-1) -> x.mean(-1)"}),
        ("y = a and b", {"a and b -> (a or b)", "a and b -> a", "a and b -> b"}),
        ("y = max(a, b)", {"max(a, b) -> min(a, b)"}),
        ("y = f(a, b)", {"f(a, b) -> f(b, a)"}),
        ("y = f(a, k=b)", {"f(a, k=b) -> f(a)"}),
        ("y = x.clamp(min=a)", {"x.clamp(min=a) -> x", "x.clamp(min=a) -> x.clamp(max=a)"}),
        ("y = x.square()", {"x.square() -> x", "x.square() -> x.sqrt()"}),
        ("y = x[a:b]", {"a:b -> :b", "a:b -> a:", "a:b -> a + 1:b", "a:b -> a:b - 1"}),
        ("y = x[rank]", {"x[rank] -> x[rank - 1]"}),
        ("if a: b = c", {"a -> False", "a -> True"}),
        ("y = b if a else c", {"a -> False", "a -> True"}),
        ("y += a", {"y += a -> pass", "y += a -> y -= a"}),
        ("f()", {"f() -> pass"}),
        ("x[a] = b", {"x[a] = b -> pass"}),
        ("for i in x: continue", {"continue -> break", "continue -> pass"}),
    ],
)
def test_each_operator_makes_its_change(text: str, wanted: set[str]) -> None:
    assert changes(text) == wanted


def test_a_variable_is_replaced_by_its_sibling_where_there_is_one() -> None:
    assert "image_bP -> text_bP" in changes("def f(image_bP, text_bP): return image_bP")
    assert changes("def f(image_bP): return image_bP") == set()


def test_a_literal_becomes_another_of_its_alternatives() -> None:
    text = """
        def f(by: Literal["max", "sum"]):
            return by == "max"
        """
    assert "\"max\" -> 'sum'" in changes(text)


def test_an_optional_argument_becomes_none_and_a_required_keyword_is_not_dropped() -> None:
    text = """
        def f(x, mask: Tensor | None, *, k): ...
        y = f(x, m, k=a)
        """
    found = changes(text)
    assert "f(x, m, k=a) -> f(x, None, k=a)" in found
    assert "f(x, m, k=a) -> f(x, m)" not in found


def test_text_for_people_and_types_are_left_alone() -> None:
    text = '''
        """Docstring 1."""
        from a import b
        def f(x: Literal[1] = a) -> Tuple[2]:
            """3"""
            assert x == 4
            if x is y:
                raise ValueError(f"5 {x + 6}")
            warn("7")
            @g(8)
            def __repr__(self):
                return 9
        '''
    assert changes(text) == {"x is y -> (x is not y)", "x is y -> False"}


def test_bytes_outside_the_change_stay_as_they_are() -> None:
    source = 'é = "é"; y = (a +  # comment\n     b) * c\n'.encode()
    (mutant,) = [
        m for m in mutants_of("m.py", source) if "+" in source[m.start : m.end].decode() and m.new == "(a - b)"
    ]
    assert mutant.apply(source) == 'é = "é"; y = ((a - b)) * c\n'.encode()


def test_a_mutant_with_the_same_bytecode_is_recognised() -> None:
    source = b"def f():\n    return 1 + 1\n"
    assert not changes_bytecode(Mutant("m.py", 20, 25, "3 - 1", "", 2), source)
    assert changes_bytecode(Mutant("m.py", 20, 25, "3 + 1", "", 2), source)
    assert not changes_bytecode(Mutant("m.py", 20, 25, "3 3", "", 2), source)


TOY = """
def larger(a, b):
    return a if a > b else b


def endless(n):
    while n:
        n = max(0, n - 1)
"""
TOY_TEST = """
from multiprocessing import get_context
from limoe_dist import toy


def test_larger():
    assert toy.larger(1, 2) == 2


def test_endless():
    toy.endless(3)


def test_another_process():
    with get_context("spawn").Pool(1) as pool:
        assert pool.apply(toy.larger, (5, 3)) == 5
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    source = tmp_path_factory.mktemp("project")
    for package in ("limoe_dist", "tests"):
        (source / package).mkdir()
        (source / package / "__init__.py").touch()
    (source / "limoe_dist/toy.py").write_text(TOY)
    (source / "tests/test_toy.py").write_text(TOY_TEST)
    return Tree(tmp_path_factory.mktemp("copy") / "tree", source=source)


def toy_mutant(old: str, new: str) -> Mutant:
    start = TOY.encode().index(old.encode())
    return Mutant("limoe_dist/toy.py", start, start + len(old), new, "", 1)


@pytest.mark.parametrize(
    ("old", "new", "status", "by"),
    [
        ("a > b", "a >= b", "survived", ""),
        ("a > b", "a < b", "killed", "tests/test_toy.py::test_larger"),
        ("a > b", "False", "killed", "tests/test_toy.py::test_another_process"),
        ("a > b", "a >", "killed", "import of tests/test_toy.py"),
        ("n - 1", "n + 1", "timed out", ""),
    ],
)
def test_the_runner_tells_what_became_of_a_mutant(tree: Tree, old: str, new: str, status: str, by: str) -> None:
    limit_s = 1.0 if status == "timed out" else 30.0
    outcome = tree.run(["tests/test_toy.py"], toy_mutant(old, new), limit_s=limit_s)
    assert (outcome.status, outcome.by) == (status, by)
    assert (tree.root / "limoe_dist/toy.py").read_text() == TOY


def test_a_list_without_tests_is_an_error(tree: Tree) -> None:
    (tree.root / "tests/test_none.py").touch()
    with pytest.raises(RuntimeError, match=r"no tests in tests/test_none\.py"):
        tree.run(["tests/test_none.py"])


def test_every_listed_test_and_module_is_there() -> None:
    for module, tests in MODULES.items():
        assert (ROOT / module).is_file()
        for test in tests:
            path, _, name = test.partition("::")
            assert (ROOT / path).exists(), test
            assert not name or f"def {name.split('[')[0]}(" in (ROOT / path).read_text(), test


def test_an_earlier_result_serves_until_the_module_or_a_test_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "limoe_dist/optim/schedule.py"
    killed, survived = (Mutant(module, 0, 0, new, "", 1) for new in "ab")
    judged = command.Judged(tmp_path / "judged.jsonl", [module])
    judged.add(killed, b"text", Outcome("killed", "test_x", 1.0, 3))
    judged.add(survived, b"text", Outcome("survived", "", 1.0, 3))
    again = command.Judged(tmp_path / "judged.jsonl", [module])
    assert again.find(killed, b"text") == Outcome("killed", "test_x", 1.0, 3)
    assert again.find(survived, b"text") == Outcome("survived", "", 1.0, 3)
    assert again.find(killed, b"changed") is None
    monkeypatch.setattr(command, "tests_of", lambda module: ("tests/mutants/test_mutants.py",))
    other_tests = command.Judged(tmp_path / "judged.jsonl", [module])
    assert other_tests.find(killed, b"text") is not None
    assert other_tests.find(survived, b"text") is None


@pytest.mark.parametrize(("floor", "code", "last"), [(0.5, 0, "1 passed, 0 failed"), (0.9, 1, "1 passed, 1 failed")])
def test_the_command_fails_below_the_floor(
    floor: float,
    code: int,
    last: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = "limoe_dist/optim/schedule.py"
    source = (ROOT / module).read_bytes()
    found = [
        command.Result(
            Mutant(module, n, n, "x", "constant", 1), Outcome(status, "", 1.0, 1), f"{module}:{n} [c] - 1 + {n}"
        )
        for n, status in enumerate(("killed", "survived", "accepted"))
    ]
    monkeypatch.setattr(command, "_outcomes", lambda *_, **__: iter(found))
    monkeypatch.setattr(command, "_unchanged", lambda *_, **__: {})
    accepted = tmp_path / "accepted.json"
    accepted.write_text(json.dumps({found[2].key: "has no effect"}))
    monkeypatch.setattr(command, "ACCEPTED", accepted)
    out = tmp_path / "out.json"
    assert command.main(["--modules", "schedule", "--floor", str(floor), "--jobs", "1", "--out", str(out)]) == code
    assert capsys.readouterr().out.splitlines()[-1] == last
    record = json.loads(out.read_text())
    assert record["survived"] == [found[1].diff]
    assert record["accepted"] == {found[2].diff: "has no effect"}
    assert source == (ROOT / module).read_bytes()
