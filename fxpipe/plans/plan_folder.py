"""A plan on disk: a folder of files, with a manifest that tells whether they are whole. Knows nothing of what is in them."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from fxpipe.errors import PlanError

MANIFEST = "manifest.json"
KIND = "fxpipe plan"
FORMAT_VERSION = 1
AGAIN = "make the plan again with fxpipe.compile and save it"


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files and their manifest beside ``path`` first and then takes its place, so that no half of a plan stands.

    A plan that is there already is replaced.

    Raises:
        PlanError: something else than a plan is at ``path``, or the disk refuses.
    """
    target = path.resolve()
    _check_replaceable(target)
    fresh = _beside(target)
    try:
        for name, content in {**files, MANIFEST: _manifest_of(files)}.items():
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
            (fresh / name).write_bytes(content)
        _take_place(fresh, target)
    except OSError as e:
        raise PlanError(f"the plan cannot be written to {path}: {e}") from e
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_folder(path: Path) -> dict[str, bytes]:
    """The files of a plan, each checked against the manifest.

    Raises:
        PlanError: there is no plan, it is of another version, or a file is missing, cut short or altered; says which.
    """
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise PlanError(f"{path}: there is {found}; expected the folder that Plan.save wrote")
    return {name: _read(path, name, entry) for name, entry in _manifest(path)["files"].items()}


def _check_replaceable(target: Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise PlanError(f"{target} is a file; a plan is a folder, so give another path or remove the file")
    if any(target.iterdir()) and not _is_plan(target):
        raise PlanError(
            f"{target} is a folder with something else than a plan in it, which would be lost; give another path"
        )


def _is_plan(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / MANIFEST).read_bytes())["kind"] == KIND)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid4().hex[:12]}")


def _take_place(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    old = _beside(target)
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _manifest_of(files: Mapping[str, bytes]) -> bytes:
    entries = {name: {"bytes": len(content), "sha256": _sha256(content)} for name, content in files.items()}
    versions = {"format_version": FORMAT_VERSION, "fxpipe": version("fxpipe"), "torch": version("torch")}
    return json.dumps({"kind": KIND, **versions, "files": entries}, indent=1).encode()


def _manifest(folder: Path) -> dict[str, Any]:
    place = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(place.read_bytes())
        kind, found, torch = manifest["kind"], manifest["format_version"], str(manifest["torch"])
        names = [PurePosixPath(name) for name in manifest["files"]]
    except FileNotFoundError:
        raise PlanError(
            f"{place}: the file is missing, so {folder} is no plan; expected what Plan.save wrote"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise PlanError(f"{place}: the file was cut short or altered ({type(e).__name__}: {e}); {AGAIN}") from e
    if kind != KIND or any(name.is_absolute() or ".." in name.parts for name in names):
        raise PlanError(f"{place}: not the manifest of a plan, its kind is {kind!r}; expected {KIND!r}; {AGAIN}")
    if found != FORMAT_VERSION:
        raise PlanError(
            f"{place}: the plan has format version {found}, written by fxpipe {manifest.get('fxpipe')}; this is fxpipe "
            f"{version('fxpipe')}, which reads version {FORMAT_VERSION}; {AGAIN}"
        )
    if _minor(torch) != _minor(version("torch")):
        raise PlanError(
            f"{place}: the plan was made with torch {torch}, this is torch {version('torch')}; operators differ between "
            f"minor versions, so {AGAIN}"
        )
    return manifest


def _minor(version_text: str) -> list[str]:
    return version_text.split(".")[:2]


def _read(folder: Path, name: str, entry: Any) -> bytes:
    place = folder / name
    try:
        content = place.read_bytes()
        n_bytes, digest = entry["bytes"], entry["sha256"]
    except FileNotFoundError:
        raise PlanError(f"{place}: the file is missing; copy the whole folder, or {AGAIN}") from None
    except (OSError, KeyError, TypeError) as e:
        raise PlanError(f"{place}: the file cannot be read ({type(e).__name__}: {e}); {AGAIN}") from e
    if len(content) < n_bytes:
        raise PlanError(
            f"{place}: the file was cut short: {len(content)} bytes, expected {n_bytes}; copy the whole folder, or {AGAIN}"
        )
    if _sha256(content) != digest:
        raise PlanError(f"{place}: the file was altered since it was saved (its sha256 is not the manifest's); {AGAIN}")
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
