"""``pytest --golden`` writes the files under ``golden/`` anew; look at the difference before it is committed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: workers share the cores

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write the golden files anew instead of comparing with them")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """``golden("page.txt", text)`` compares with the file, or writes it."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / name
        if request.config.getoption("--golden"):
            file.write_text(text + "\n")
        assert text + "\n" == file.read_text(), f"golden/{name} differs; pytest --golden writes it anew"

    return check


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, so that one that fails fails again; none where torch is not loaded."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that loads a model from a file leaves no folder behind for the next to import from."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
