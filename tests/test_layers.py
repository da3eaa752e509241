"""The floors of the house, read off the imports: see ``floors.py`` for the table."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from floors import FLOOR_OF, NAMES_THE_PASSES, NO_TORCH, NO_TORCH_BUT_NUMPY, NOT_PASSES

ROOT = Path(__file__).parents[1]
ROOMS = {"fxpipe": "fxpipe", "passes": "fxpipe.passes", "triton_kernels": "fxpipe.triton_kernels"}

FILES = sorted(str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def module_of(file: str) -> str:
    """``passes/lower.py`` -> ``fxpipe.passes.lower``."""
    room, *rest = file.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join([ROOMS[room], *rest])


FILE_OF = {module_of(file): file for file in FILES}


def statements(file: str, *, deferred: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports of a file; with ``deferred``, also those in functions and under TYPE_CHECKING."""
    waiting: list[ast.AST] = [parsed(file)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        hidden = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if deferred or not (hidden or typing_only):
            waiting.extend(ast.iter_child_nodes(node))


@cache
def parsed(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(), file)


def imported(file: str, *, deferred: bool = True) -> set[str]:
    """The full names a file imports: ``fxpipe.errors``, ``fxpipe.errors.OptionError``, ``torch.fx``."""
    package = module_of(file) if file.endswith("__init__.py") else module_of(file).rpartition(".")[0]
    names: set[str] = set()
    for node in statements(file, deferred=deferred):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        else:
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            names.update([module] if node.module else [], (f"{module}.{alias.name}" for alias in node.names))
    return names


def imported_files(file: str, *, deferred: bool = True) -> set[str]:
    """The files of the house that a file imports: the deepest that each name stands for."""
    names = imported(file, deferred=deferred)
    deeper = {name.rpartition(".")[0] for name in names if name in FILE_OF}
    found = {FILE_OF[name] for name in names if name in FILE_OF and name not in deeper}
    return found - {file}


def loaded_files(file: str) -> set[str]:
    """Every file of the house that importing this one runs, with the packages above each."""
    seen: set[str] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        waiting.extend(imported_files(current, deferred=False))
        parts = module_of(current).split(".")
        waiting.extend(FILE_OF[".".join(parts[:n])] for n in range(1, len(parts)))
    return seen


def test_the_table_lists_every_file_and_no_other():
    assert sorted(FLOOR_OF) == FILES


@pytest.mark.parametrize("file", FILES)
def test_imports_only_lower_floors(file):
    floor = FLOOR_OF.get(file, 0)
    too_high = {other for other in imported_files(file) if FLOOR_OF.get(other, 99) >= floor}
    assert not too_high, f"{file} is on floor {floor}"


@pytest.mark.parametrize("file", NO_TORCH)
def test_loads_no_torch(file):
    heavy = {other for other in loaded_files(file) for name in imported(other, deferred=False) if is_heavy(name)}
    assert not heavy


@pytest.mark.parametrize("file", NO_TORCH_BUT_NUMPY)
def test_loads_nothing_heavier_than_numpy(file):
    names = {name for other in loaded_files(file) for name in imported(other, deferred=False) if is_heavy(name)}
    assert {name.partition(".")[0] for name in names} == {"numpy"}


def is_heavy(name: str) -> bool:
    return name.partition(".")[0] in ("torch", "triton", "sympy", "numpy", "tabulate", "transformers")


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("fxpipe/ir/")])
def test_ir_knows_only_errors_and_itself(file):
    assert all(other == "fxpipe/errors.py" or other.startswith("fxpipe/ir/") for other in imported_files(file))


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("triton_kernels/")])
def test_triton_kernels_is_a_leaf(file):
    assert all(other.startswith("triton_kernels/") for other in imported_files(file))


def test_passes_never_import_each_other():
    passes = {file for file in FILES if file.startswith("passes/")} - set(NOT_PASSES)
    assert {file: found for file in passes if (found := imported_files(file) & passes)} == {}


def test_only_the_pipeline_names_the_passes():
    passes = {file for file in FILES if file.startswith("passes/")} - set(NOT_PASSES)
    assert [file for file in FILES if imported_files(file) & passes and file not in NAMES_THE_PASSES] == []


def test_only_tables_imports_tabulate():
    assert [file for file in FILES if "tabulate" in imported(file)] == ["fxpipe/tables.py"]


def test_only_torch_pp_imports_private_names_of_the_pipelining_runtime():
    private = {
        file
        for file in FILES
        for name in imported(file)
        if name.startswith("torch.distributed.pipelining.") and "._" in name
    }
    assert private <= {"fxpipe/runtime/torch_pp.py"}


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("triton_kernels/ops.py", {"triton_kernels/cpu.py", "triton_kernels/format.py"}),
        ("fxpipe/ir/cost.py", {"fxpipe/errors.py", "fxpipe/ir/expression.py"}),
    ],
)
def test_the_reader_of_imports_sees_relative_and_deferred_ones(file, names):
    assert names <= imported_files(file)
