"""Choice of the engine: the graph in ONNX Runtime or OpenVINO, or the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.errors import PlacementError, TrustError
from mlflow_safeflavor.graph.file import reason_against
from mlflow_safeflavor.machine import is_plainly_cpu
from mlflow_safeflavor.predict.options import is_chosen_here

if TYPE_CHECKING:
    import torch

    from mlflow_safeflavor.load.options import LoadOptions

__all__ = ["casts", "choose_engine", "needs_no_module"]


def choose_engine(
    spec: ModelSpec, layout: Layout, chosen: Mapping[str, Any], options: LoadOptions
) -> str:
    """Choose the engine: "onnx", "openvino" or "module".

    A graph is served in float32 on a CPU, by OpenVINO also in bfloat16; any other request needs the
    module.

    Raises:
        TrustError: The artifact, not the caller, asks for OpenVINO.
        PlacementError: The engine that was asked for cannot take the rest of the request.
    """
    # OpenVINO crashes on hostile arguments of a graph: the artifact alone may not choose it.
    stored = not is_chosen_here("engine", options.model_config)
    if stored and chosen["engine"] == "openvino" and "code" not in options.trust:
        raise TrustError(
            "The model asks for OpenVINO, whose kernels trust the graph's arguments",
            where="engine",
            wanted='trust={"code"}, or an engine that whoever loads it chose',
            hint='pass model_config={"engine": "openvino"} if you trust who saved it; else '
            '{"engine": "onnx"}',
        )
    alone = spec.structure == "graph"
    asked = "onnx" if alone and chosen["engine"] == "auto" else chosen["engine"]
    # "auto" is the CPU for who asks for a graph, on a machine with a GPU, too. Otherwise torch has
    # to be asked, unless it is plain that there is no accelerator.
    chooses = asked in ("onnx", "openvino") and options.device == "auto"
    device = (
        "cpu"
        if chooses or options.device_map or is_plainly_cpu(options.device)
        else _device(options.device)
    )
    dtype = casts(spec, options.dtype)
    other = {
        "dtype": dtype if asked != "openvino" or dtype != "bfloat16" else None,
        "device_map": options.device_map,
        "compile": chosen["compile"],
        "device": device if device != "cpu" else None,
    }
    needs_module = [name for name, value in other.items() if value]
    reason = reason_against(layout)
    if asked == "auto":
        return "module" if needs_module or reason else "onnx"
    if asked == "module" and alone:
        raise PlacementError(
            "The model was stored as a graph alone, so there is no module to rebuild",
            where="engine",
            wanted="onnx",
            found="module",
            hint='leave it out, or save the model with graph="auto"',
        )
    if asked != "module" and (needs_module or reason is not None):
        raise PlacementError(
            "The model cannot be served as a graph like this",
            where=", ".join(needs_module) or "engine",
            wanted="a graph, which is served in float32 on a CPU, by OpenVINO also in bfloat16",
            found=reason or ", ".join(f"{name}={other[name]!r}" for name in needs_module),
            hint='leave those out, or pass engine="module" where the model was saved with its '
            "module",
        )
    return asked


def needs_no_module(
    spec: ModelSpec, layout: Layout, chosen: Mapping[str, Any], options: LoadOptions
) -> bool:
    """Whether the graph answers, as far as can be told before torch is imported."""
    # Asked before the environment is compared: then pins that only the module needs do not count.
    # Where drivers of an accelerator are in sight, torch must tell, and all pins do.
    asked = chosen["engine"]
    alone = asked == "auto" and spec.structure == "graph"
    by_default = asked == "auto" and is_plainly_cpu(options.device)
    return (
        asked in ("onnx", "openvino")
        or alone
        or (by_default and choose_engine(spec, layout, chosen, options) == "onnx")
    )


def _device(asked: str | int | torch.device) -> str:
    from mlflow_safeflavor.module.devices import resolve_device

    return str(resolve_device(asked))


def casts(spec: ModelSpec, dtype: str | torch.dtype | None) -> str | None:
    """The dtype that was asked for, if it differs from the saved one."""
    asked = str(dtype or "").removeprefix("torch.")
    return asked if asked and asked != spec.dtype else None
