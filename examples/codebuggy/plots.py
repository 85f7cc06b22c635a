"""Pictures of a training, for the run in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import ConfusionMatrixDisplay


def draw_curves(
    losses: Sequence[float], accuracies: Mapping[int, float], baseline: float
) -> Figure:
    """Loss by step, smoothed, and validation accuracy by the step at which it was measured."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = max(1, len(losses) // 40)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    left.plot(np.arange(window, len(losses) + 1), smooth)
    left.set(title="Training loss", xlabel="step", ylim=(0, None))
    right.plot(list(accuracies), list(accuracies.values()), marker="o", label="model")
    right.axhline(baseline, linestyle="--", color="gray", label="bag of tokens, on held-out pairs")
    right.set(title="Validation accuracy", xlabel="step")
    right.legend()
    return figure


def draw_confusion(right: Sequence[int], said: Sequence[int], labels: Sequence[str]) -> Figure:
    """How many held-out pairs of each label were called what."""
    figure = Figure(figsize=(4.4, 3.8), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        right,
        said,
        labels=range(len(labels)),
        display_labels=labels,
        ax=axes,
        colorbar=False,
        cmap="Blues",
    )
    axes.set_title("Held-out pairs")
    return figure


def draw_rules(accuracies: Mapping[str, tuple[float, int]]) -> Figure:
    """Accuracy on held-out pairs by what was changed; name → accuracy and number of pairs."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    ordered = sorted(accuracies.items(), key=lambda entry: entry[1][0])
    bars = axes.barh(
        [f"{name} ({count})" for name, (_, count) in ordered], [value for _, (value, _) in ordered]
    )
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(0.5, linestyle="--", color="gray")
    axes.set(title="Held-out accuracy by change", xlim=(0, 1.1))
    return figure
