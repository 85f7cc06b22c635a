"""The verify story: does a saved model still answer as it did?"""

from __future__ import annotations

from mlflow_safeflavor.artifact import Layout
from mlflow_safeflavor.load import LoadOptions, load_folder, locate
from mlflow_safeflavor.parity import ParityReport, replay

__all__ = ["verify_model"]


def verify_model(model_uri: str, *, device: str = "auto") -> ParityReport:
    """Load a model with every check but the last, answer its golden rows, and say how they compare.

    Args:
        model_uri: See ``load_model``.
        device: See ``load_model``.

    Returns:
        The comparison, whether it is good or bad.

    Raises:
        SafeFlavorError: The model cannot be loaded.
    """
    root = locate(model_uri)
    return replay(load_folder(root, LoadOptions(device=device, replay=False)), Layout(root))
