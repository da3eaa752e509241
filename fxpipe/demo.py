"""``fxpipe demo``: a small GPT learns characters of real text on two ranks, compressed, next to one plain process."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fxpipe import printing, units
from fxpipe.api import compile
from fxpipe.costs.rehearse import Prediction, rehearse
from fxpipe.launch import Job, Result, run
from fxpipe.model_source import load_model
from fxpipe.plans.plan import Plan

MODEL = "demo:gpt"
MODEL_ARGUMENTS = {"batch": 16, "length": 64, "width": 128, "n_layers": 4, "n_heads": 4}
N_RANKS = 2
OPTIONS = {"n_ranks": N_RANKS, "n_microbatches": 8, "format": "bfp4b32", "schedule": "1f1b"}
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 50


@dataclass(frozen=True)
class Report:
    """What the demo found: both runs, the plan's prediction, where the files are."""

    pipeline: Result
    eager: Result
    prediction: Prediction
    folder: str


def run_demo(steps: int, folder: Path) -> tuple[Report, str]:
    """Plans and trains both ways; writes plan/, plan.txt, losses.csv, report.json and report.txt into ``folder``.

    Returns the report and its text.

    Raises:
        RuntimeFailure: a run ended with an error.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    source = load_model(MODEL, MODEL_ARGUMENTS)
    plan = compile(source.model, source.kwargs, OPTIONS)
    plan.save(folder / "plan")
    (folder / "plan.txt").write_text(f"{plan}\n")
    prediction = rehearse(plan, source.args, source.kwargs)
    common: dict[str, Any] = {
        "model": MODEL,
        "arguments": MODEL_ARGUMENTS,
        "options": OPTIONS,
        "steps": steps,
        "text": True,
        "learning_rate": LEARNING_RATE,
        "warm_up_steps": WARM_UP_STEPS,
    }
    pipeline = run(Job(**common, plan=str(folder / "plan"), label="pipeline, 2 ranks"), N_RANKS)
    eager = run(Job(**common, engine="eager", n_threads=os.cpu_count() or 1, label="one plain process"), 1)
    report = Report(pipeline, eager, prediction, str(folder))
    text = report_text(report, plan)
    _write(report, text)
    return report, text


def _write(report: Report, text: str) -> None:
    folder = Path(report.folder)
    rows = zip(report.pipeline.losses, report.eager.losses, strict=True)
    lines = [f"{i},{a:.6f},{b:.6f}" for i, (a, b) in enumerate(rows, 1)]
    (folder / "losses.csv").write_text("\n".join(["step,pipeline,one_process", *lines]) + "\n")
    (folder / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    (folder / "report.txt").write_text(text + "\n")


def report_text(report: Report, plan: Plan) -> str:
    """Two tables: the loss as it fell, and the figures side by side."""
    return "\n\n".join((_curve(report.pipeline.losses, report.eager.losses), _figures(report, plan), _files(report)))


def _curve(pipeline: Sequence[float], eager: Sequence[float], n_rows: int = 8) -> str:
    """The mean loss over equal parts of the run."""
    size = -(-len(pipeline) // n_rows)
    rows = []
    for start in range(0, len(pipeline), size):
        part = slice(start, start + size)
        a, b = _mean(pipeline[part]), _mean(eager[part])
        rows.append(
            [f"{start + 1}-{min(start + size, len(pipeline))}", f"{a:.4f}", f"{b:.4f}", f"{100 * (a / b - 1):+.2f} %"]
        )
    return printing.table(rows, ["steps", "loss, 2 ranks bfp4b32", "loss, one process", "difference"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figures(report: Report, plan: Plan) -> str:
    a, b, p = report.pipeline, report.eager, report.prediction
    rows: list[list[object]] = [
        ["final loss (mean of the last 20 steps)", f"{_mean(a.losses[-20:]):.4f}", f"{_mean(b.losses[-20:]):.4f}"],
        ["validation loss", _loss(a.validation_loss), _loss(b.validation_loss)],
        ["saved for backward, one microbatch", units.format_bytes(a.saved_bytes), units.format_bytes(b.saved_bytes)],
        ["most held at once, by rank", _each(a.peak_saved_bytes), _each(b.peak_saved_bytes)],
        ["step time, measured", units.format_seconds(a.step_seconds), units.format_seconds(b.step_seconds)],
        ["step time, predicted", units.format_seconds(p.step_seconds), None],
        ["bubble, measured", _percent(a.bubble), None],
        ["bubble, predicted", _percent(p.bubble), None],
        ["training time", units.format_seconds(a.seconds), units.format_seconds(b.seconds)],
    ]
    return printing.table(
        rows, ["", f"{plan.options.n_ranks} ranks, 1f1b, {plan.options.format}", "one process, uncompressed"]
    )


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def _each(sizes: Sequence[int]) -> str:
    return ", ".join(map(units.format_bytes, sizes))


def _files(report: Report) -> str:
    return f"Written to {report.folder}: plan/ (fxpipe.load reads it), plan.txt, losses.csv, report.txt, report.json"
