"""Choice of the engine: the graph in ONNX Runtime or OpenVINO, or the module."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import PlacementError, TrustError
from mlflow_safeflavor.graph.file import reason_against
from mlflow_safeflavor.load.saved import Saved
from mlflow_safeflavor.machine import is_plainly_cpu

if TYPE_CHECKING:
    import torch

__all__ = ["casts", "choose_engine", "needed_environment", "require_trusted_engine"]


def require_trusted_engine(engine: str, asked: Mapping[str, Any], trust: Collection[str]) -> None:
    """Refuse OpenVINO where only whoever saved the model asks for it.

    Args:
        engine: The run-time option.
        asked: What whoever loads the model sets.
        trust: Kinds of the artifact's own code that may run.

    Raises:
        TrustError: Nobody here agreed to it.
    """
    # OpenVINO crashes on hostile arguments of a graph: the artifact alone may not choose it.
    if engine == "openvino" and "engine" not in asked and "code" not in trust:
        raise TrustError(
            "The model asks for OpenVINO, whose kernels trust the graph's arguments",
            where="engine",
            wanted='trust={"code"}, or an engine that whoever loads it chose',
            hint='pass model_config={"engine": "openvino"} if you trust who saved it; else '
            '{"engine": "onnx"}',
        )


def choose_engine(
    saved: Saved,
    chosen: Mapping[str, Any],
    *,
    device: str | int | torch.device,
    dtype: str | torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
) -> str:
    """Choose the engine: "onnx", "openvino" or "module".

    A graph is served in float32 on a CPU, by OpenVINO also in bfloat16; any other request needs the
    module.

    Raises:
        PlacementError: The engine that was asked for cannot take the rest of the request.
    """
    alone = saved.spec.structure == "graph"
    asked = "onnx" if alone and chosen["engine"] == "auto" else chosen["engine"]
    # "auto" is the CPU for who asks for a graph, on a machine with a GPU, too. Otherwise torch has
    # to be asked, unless it is plain that there is no accelerator.
    chooses = asked in ("onnx", "openvino") and device == "auto"
    place = "cpu" if chooses or device_map or is_plainly_cpu(device) else _device(device)
    cast = casts(saved.spec, dtype)
    other = {
        "dtype": cast if asked != "openvino" or cast != "bfloat16" else None,
        "device_map": device_map,
        "compile": chosen["compile"],
        "device": place if place != "cpu" else None,
    }
    needs_module = [name for name, value in other.items() if value]
    reason = reason_against(saved.layout)
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


def needed_environment(
    saved: Saved,
    chosen: Mapping[str, Any],
    *,
    device: str | int | torch.device,
    dtype: str | torch.dtype | None,
    device_map: str | Mapping[str, Any] | None,
) -> Environment:
    """The recorded environment, cut to the graph's needs where the graph will surely answer."""
    # Where torch and transformers are not installed a graph is served all the same: their absence
    # is no difference then.
    asked = chosen["engine"]
    alone = asked == "auto" and saved.spec.structure == "graph"
    if asked in ("onnx", "openvino") or alone:
        return saved.environment.for_graph()
    # Told before torch is imported: where drivers of an accelerator are in sight, torch must tell,
    # and all pins count.
    if asked == "module" or not is_plainly_cpu(device):
        return saved.environment
    name = choose_engine(saved, chosen, device=device, dtype=dtype, device_map=device_map)
    return saved.environment.for_graph() if name == "onnx" else saved.environment


def _device(asked: str | int | torch.device) -> str:
    from mlflow_safeflavor.module.devices import resolve_device

    return str(resolve_device(asked))


def casts(spec: ModelSpec, dtype: str | torch.dtype | None) -> str | None:
    """The dtype that was asked for, if it differs from the saved one."""
    asked = str(dtype or "").removeprefix("torch.")
    return asked if asked and asked != spec.dtype else None
