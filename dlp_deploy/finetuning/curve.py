"""How the loss fell: a picture, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..storage import write_json

TRAINING, HELD_OUT, INK = "#9aa5b1", "#e08e45", "#22303c"
SMOOTHED = "#2a8c82"


@dataclass(frozen=True)
class LoggedStep:
    """One step of the optimizer: mean loss of its batch, and the run's seconds when it was done."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float


def logged_steps(history: Sequence[dict[str, Any]]) -> list[LoggedStep]:
    """The steps in a Trainer's log history."""
    return [
        LoggedStep(entry["step"], entry["loss"], entry["learning_rate"], entry["grad_norm"], entry["seconds"])
        for entry in history
        if "loss" in entry
    ]


def write_log(path: Path, steps: Sequence[LoggedStep], held_out: tuple[float, float]) -> None:
    before, after = held_out
    write_json(
        path,
        {"held_out_loss": {"before": before, "after": after}, "steps": [asdict(step) for step in steps]},
    )


def draw(path: Path, steps: Sequence[LoggedStep], held_out: tuple[float, float], distilled: bool) -> None:
    """Write a PNG of the training loss over steps, with the held-out loss before and after."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    places = [step.step for step in steps]
    losses = [step.loss for step in steps]
    axes.plot(places, losses, color=TRAINING, linewidth=0.8, label="training, each step")
    axes.plot(places, _smoothed(losses), color=SMOOTHED, linewidth=1.8, label="training, running mean")
    axes.plot(
        (0, places[-1] if places else 0),
        held_out,
        color=HELD_OUT,
        marker="o",
        linestyle=(0, (4, 3)),
        label="held out, before and after",
    )
    for place, loss in zip((0, places[-1] if places else 0), held_out, strict=True):
        axes.annotate(f"{loss:.3f}", (place, loss), xytext=(0, 7), textcoords="offset points", color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("nats per token" + (" (training: with distillation)" if distilled else ""), color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d9dee3", linewidth=0.6)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png")


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential running mean over about a twentieth of the run, without a bias at its start."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    mean, weight = 0.0, 0.0
    means = []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        means.append(mean / weight)
    return means
