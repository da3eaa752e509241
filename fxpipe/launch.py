"""Starting a training run: one process here, or one for each rank through torchrun."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxpipe.errors import RuntimeFailure


@dataclass(frozen=True)
class Job:
    """A training run as plain data. ``model`` is MODEL of the command line; ``demo`` arguments go to its function.

    engine: ``fxpipe`` runs the plan that ``options`` describe (or the one saved in ``plan``), ``eager`` the model as it is.
    Data: windows of real text for a model that takes ``input_ids`` and ``labels`` when ``text`` is set, else the example
    inputs, the same in every step. The learning rate grows to its full height over ``warm_up_steps``.
    """

    model: str
    options: Mapping[str, Any]
    steps: int
    arguments: Mapping[str, Any]
    plan: str | None = None
    engine: str = "fxpipe"
    text: bool = False
    learning_rate: float = 1e-3
    warm_up_steps: int = 0
    seed: int = 0
    n_threads: int = 1
    label: str = "training"


@dataclass(frozen=True)
class Result:
    """What a run gives back. ``step_seconds`` is the median after warm-up; ``bubble`` the idle share of all ranks in it.

    ``saved_bytes`` is what one microbatch holds between its forward and its backward, summed over the stages;
    ``peak_saved_bytes`` the most that each rank held at once.
    """

    losses: tuple[float, ...]
    validation_loss: float | None
    step_seconds: float
    bubble: float | None
    saved_bytes: int
    peak_saved_bytes: tuple[int, ...]
    seconds: float


def run(job: Job, n_ranks: int) -> Result:
    """Runs the job in ``n_ranks`` processes under torchrun (one: in a process of its own), showing its progress.

    Raises:
        RuntimeFailure: the run ended with an error, which its output shows.
    """
    with tempfile.TemporaryDirectory(prefix="fxpipe-") as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "result.json"
        request.write_text(json.dumps(asdict(job)))
        command = [*_command(n_ranks), str(request), str(answer)]
        started = subprocess.run(command, env=_environment(job.n_threads), check=False)
        if started.returncode or not answer.exists():
            raise RuntimeFailure(
                f"{job.label} on {n_ranks} ranks ended with exit code {started.returncode}; "
                "its output above says which rank and why"
            )
        found = json.loads(answer.read_text())
    return Result(**{**found, "losses": tuple(found["losses"]), "peak_saved_bytes": tuple(found["peak_saved_bytes"])})


def _command(n_ranks: int) -> list[str]:
    if n_ranks == 1:
        return [sys.executable, "-m", "fxpipe.worker"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    return [*torchrun, "-m", "fxpipe.worker"]


def _environment(n_threads: int) -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    # Passive: threads that spin while they wait take the cores from whoever else works on this machine.
    return {**kept, "OMP_NUM_THREADS": str(n_threads), "OMP_WAIT_POLICY": "passive"}
