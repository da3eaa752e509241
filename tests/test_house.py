"""The traps of the layout, the front door and the packaging."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fxpipe

ROOT = Path(__file__).parents[1]
BIN = str(Path(sys.executable).parent)
ROOMS = ("fxpipe", "passes", "triton_kernels")
SOURCES = sorted(str(path.relative_to(ROOT)) for room in ROOMS for path in (ROOT / room).rglob("*.py"))
DOOR = [name for name in fxpipe.__all__ if not name.startswith("_")]


def run(*command: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, *arguments, cwd=cwd, **environment)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The sources as in a fresh clone."""
    tree = tmp_path_factory.mktemp("clone")
    for room in (*ROOMS, "tools"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree / file)
    return tree


@pytest.fixture(scope="module")
def wheel(copy, tmp_path_factory) -> Path:
    """The folder that a plain ``pip install .`` would add to site-packages."""
    site = tmp_path_factory.mktemp("site")
    source = shutil.copytree(copy, site / "source")
    built = python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(site), ".", cwd=source)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(site.glob("*.whl"))) as archive:
        archive.extractall(site / "packages")
    return site / "packages"


# The three traps of a package whose folders lie beside it. `-S` leaves the editable install out.


def test_the_wheel_holds_every_source_under_its_installed_name(wheel):
    installed = {re.sub(r"^(passes|triton_kernels)/", r"fxpipe/\1/", source) for source in SOURCES}
    assert {str(path.relative_to(wheel)) for path in wheel.rglob("*.py")} == installed
    assert (wheel / "fxpipe" / "py.typed").exists()
    assert (wheel / "fxpipe" / "triton_kernels" / "bfp.c").exists()
    assert (wheel / "fxpipe" / "triton_kernels" / "bfp_numbers.h").exists()


def test_a_plain_install_works_away_from_the_checkout(wheel, tmp_path):
    shell = python(
        "-S", "-c", "import fxpipe, fxpipe.passes; print(fxpipe.__file__)", cwd=tmp_path, PYTHONPATH=str(wheel)
    )
    assert shell.stdout.strip() == str(wheel / "fxpipe" / "__init__.py"), shell.stderr


def test_a_plain_install_says_so_in_the_checkout(wheel, copy):
    shell = python("-S", "-c", "import fxpipe", cwd=copy, PYTHONPATH=str(wheel))
    message = r"ImportError: .*fxpipe/__init__.py is a bare checkout, without fxpipe.passes: `pip install -e` it"
    assert re.search(message, shell.stderr)


@pytest.mark.parametrize("room", ["passes", "triton_kernels"])
def test_a_room_refuses_its_bare_name(room):
    shell = python("-c", f"import {room}", cwd=ROOT)
    assert re.search(rf"ImportError: this folder is the package fxpipe\.{room}", shell.stderr)


def test_the_tests_run_as_pytest():
    assert str(ROOT) not in {os.path.abspath(entry) for entry in sys.path}, "run `pytest`, not `python -m pytest`"


def test_the_type_check_sees_every_file(copy):
    for source in SOURCES:
        text = (copy / source).read_text()
        (copy / source).write_text(f"planted = len(0)\n{text}")
    cache = str(ROOT / ".mypy_cache")
    check = run("bash", "tools/check.sh", BIN=BIN, SOURCE=str(copy), ONLY_TYPES="1", MYPY_CACHE_DIR=cache)
    assert check.returncode != 0
    assert sorted(set(re.findall(r"^(\S+\.py):\d+: error: Argument 1\b", check.stdout, re.M))) == SOURCES


def test_style_format_and_types():
    check = run("bash", "tools/check.sh", BIN=BIN)
    assert check.returncode == 0, check.stdout + check.stderr


# The front door.


@pytest.mark.parametrize("name", DOOR)
def test_every_name_of_the_door_opens(name):
    assert getattr(fxpipe, name) is not None


def test_no_name_of_the_door_is_also_a_module():
    """Importing the module ``fxpipe.x`` would replace the name ``fxpipe.x``."""
    assert [
        name for name in DOOR if (ROOT / "fxpipe" / f"{name}.py").exists() or (ROOT / "fxpipe" / name).exists()
    ] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fxpipe' has no attribute 'nonsense'"):
        fxpipe.nonsense  # noqa: B018


def test_the_door_is_small():
    assert len((ROOT / "fxpipe" / "__init__.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("statement", ["import fxpipe", "import fxpipe.cli; fxpipe.cli.parser().format_help()"])
def test_importing_loads_nothing_heavy(statement, tmp_path):
    heavy = "{'torch', 'triton', 'sympy', 'numpy', 'tabulate'} & set(sys.modules)"
    shell = python("-c", f"import sys; {statement}; print({heavy})", cwd=tmp_path)
    assert shell.stdout.strip() == "set()", shell.stderr


@pytest.mark.parametrize("command", [["-m", "fxpipe", "--help"], [f"{BIN}/fxpipe", "--help"]])
def test_help_lists_the_commands(command, tmp_path):
    shell = python(*command, cwd=tmp_path)
    assert "show" in shell.stdout, shell.stderr


# The package.


def test_version_and_entry_points_are_installed():
    assert importlib.metadata.version("fxpipe") == fxpipe.__version__ == "0.1.0"
    backends = importlib.metadata.entry_points(group="torch_dynamo_backends")
    assert backends["fxpipe"].value == "fxpipe.backend:fxpipe"


def test_constraints_pin_every_direct_requirement():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in asked} - {"fxpipe"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert names <= set(pinned)
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")
