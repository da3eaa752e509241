"""What compressed saves do to gradients and to training, beside torch's own 8-bit saves.

    python tools/bench_quality.py [--part gradient] [--part text] [--part digits] [--format bfp4b32 ...] [--runs FILE] [--check]

**gradient**: one batch through a ResNet-26 (images of 96), a ViT and a Llama (4 layers of width 192) with random weights, by
eager operators (``saved_gradients.py``). The error is that of all gradients together, over the norm of the exact ones; the
loss must be equal to the bit. "e4m3" and "e5m2" are torch's ``activation_quantization_aten_pass`` with scales, for values of
8 KiB and more, so that statistics stay exact as in ours.

**text**, **digits**: a character GPT (3 layers of width 96) on the pages of Python's ``help()``, and a CNN on scikit-learn's
digits, trained with ``recompute-attention`` (``trained_models.py``) from the same weights on the same batches with every
format, for 3 seeds. Reported is the validation loss less fp32's, seed by seed, as mean and standard error; the noise is the
standard deviation of fp32's loss over the seeds.

``bits`` are stored bits of all compressed values over their number, scales, outliers and values kept by a pattern included.
With ``--runs`` each finished run is written to FILE, and those that are there are not run again.
Prints tables, and JSON as the last line. ``--check`` exits with 1 where a figure is missed.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from saved_gradients import gradient_rows
from trained_models import Runs

from fxpipe import printing

EIGHT = "bfp8b32+e5m3"
GRADIENT_SETTINGS = (
    "e4m3",
    "e5m2",
    "bfp4b32",
    "bfp4b32:gauss+e5m3+search",
    "bfp4b64:gauss+e5m3+search+o1",
    "bfp4b16:gauss+e5m3+search",
    "bfp8b32",
    EIGHT,
)
TRAINED = {
    "text": (
        "bfp4b32:gauss+e6m2",
        "norm=bfp5b32:gauss+e6m2,default=bfp3b32:gauss+e6m2",
        "bfp2b32:gauss+se5m2",
    ),
    "digits": ("bfp4b32:gauss+e6m2+search", "bfp3b32:gauss+e6m2+search", "bfp2b32:gauss+se5m2+search"),
}
"""For each task. The search for the least error makes values smaller, which a transformer feels more than their noise.

Early in the text task the values of the last norm weigh the most: they have 5 bits.
"""
AT_MOST = {"cnn": 0.10, "vit": 0.10, "llama": 0.19}
"""Relative error of the gradient with 4 bits, 4.5 at most with scales and outliers."""
TRAINING_LIMITS = ((2.35, 0.02), (3.35, 0.002), (4.3, None))
"""A format of at most so many bits ends within so much of fp32's validation loss; ``None``: within the noise of its seeds."""
SEEDS = (0, 1, 2)


def training_rows(name: str, settings: Sequence[str], runs: Runs) -> Iterator[dict[str, Any]]:
    """One row for fp32, with its noise, and one for each format."""
    exact = [runs(name, seed, "fp32")["loss"] for seed in SEEDS]
    noise = statistics.stdev(exact)
    yield {
        "task": name,
        "setting": "fp32",
        "bits": 32.0,
        "loss": statistics.mean(exact),
        "difference": 0.0,
        "error": noise,
    }
    for setting_name in settings:
        found = [runs(name, seed, setting_name) for seed in SEEDS]
        differences = [run["loss"] - loss for run, loss in zip(found, exact, strict=True)]
        yield {
            "task": name,
            "setting": setting_name,
            "bits": found[0]["bits"],
            "loss": statistics.mean(run["loss"] for run in found),
            "difference": statistics.mean(differences),
            "error": statistics.stdev(differences) / len(SEEDS) ** 0.5,
        }


def figures(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each figure that was measured: its name, what was reached, the limit."""
    found = []
    of = {(r["model"], r["setting"]): r for r in report["gradient"]}
    for model, limit in AT_MOST.items() if of else ():
        four = min(r["error"] for (m, _), r in of.items() if m == model and r["bits"] and 4 <= r["bits"] <= 4.5)
        eight, e4m3 = of[model, EIGHT]["error"], of[model, "e4m3"]["error"]
        found.append({"figure": f"{model}: gradient error, 4 bits", "reached": four, "limit": limit})
        if not math.isnan(e4m3):
            found.append({"figure": f"{model}: error of 8 bits / of e4m3", "reached": eight / e4m3, "limit": 1 / 3})
        else:
            found.append({"figure": f"{model}: error of 8 bits, where e4m3 makes NaN", "reached": eight, "limit": 0.05})
        changed = sum(not r["same_loss"] for (m, s), r in of.items() if m == model and s not in ("e4m3", "e5m2"))
        found.append({"figure": f"{model}: losses that changed", "reached": changed, "limit": 0})
    for name, rows in report["training"].items():
        for most, limit in TRAINING_LIMITS:
            reached = [r["difference"] for r in rows if r["setting"] != "fp32" and r["bits"] <= most]
            if reached:
                bound = rows[0]["error"] if limit is None else limit
                found.append(
                    {
                        "figure": f"{name}: loss over fp32's, at most {most} bits",
                        "reached": min(reached),
                        "limit": bound,
                    }
                )
    return [{**f, "met": f["reached"] <= f["limit"]} for f in found]


def tables(report: dict[str, Any]) -> str:
    """The report for people."""
    parts = []
    for rows in (report["gradient"], *report["training"].values(), report["figures"]):
        if rows:
            parts.append(printing.table([list(row.values()) for row in rows], [k.replace("_", " ") for k in rows[0]]))
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description="gradients and training with compressed saves")
    parser.add_argument("--part", action="append", choices=("gradient", "text", "digits"), help="all without it")
    parser.add_argument("--format", action="append", help="another format to measure, as well; may be repeated")
    parser.add_argument("--runs", type=Path, help="file of finished training runs, read and added to")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a figure is missed")
    asked = parser.parse_args()
    parts, more, runs = asked.part or ("gradient", "text", "digits"), asked.format or [], Runs(asked.runs)
    report: dict[str, Any] = {"gradient": [], "training": {}}
    if "gradient" in parts:
        report["gradient"] = list(gradient_rows((*GRADIENT_SETTINGS, *more)))
    for name in ("text", "digits"):
        if name in parts:
            report["training"][name] = list(training_rows(name, (*TRAINED[name], *more), runs))
    report["figures"] = figures(report)
    print(tables(report))
    print(json.dumps(report))
    return int(asked.check and not all(f["met"] for f in report["figures"]))


if __name__ == "__main__":
    sys.exit(main())
