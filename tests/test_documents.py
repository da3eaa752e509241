"""The pages are true: the README's examples run, its commands parse, and ARCHITECTURE.md names every file once."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from floors import FLOOR_OF

from fxpipe.cli import parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.splitlines()
    if line.startswith("fxpipe")
]


def test_the_readmes_python_runs_from_top_to_bottom(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 3
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    shell = subprocess.run([sys.executable, "readme.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert shell.returncode == 0, shell.stderr


@pytest.mark.parametrize("line", COMMANDS)
def test_the_readmes_commands_parse(line):
    parser().parse_args(shlex.split(line, comments=True)[1:])


def test_the_readme_names_only_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in ("README.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"^ +make ([a-z-]+)", (ROOT / page).read_text(), re.M)) <= targets


def test_architecture_names_every_file_once():
    named = re.findall(r"^\| `(.*?)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M)
    assert sorted(named) == sorted(FLOOR_OF)


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", (ROOT / page).read_text()):
        assert (ROOT / target).exists(), target
