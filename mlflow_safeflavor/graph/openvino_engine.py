"""A graph in OpenVINO: arrays in, arrays out, in float32 or, if asked for, in bfloat16.

OpenVINO gets no file and no path, but the checked graph, written anew with its weights as inputs;
these are then replaced by constants whose memory are the weights' mapped and compared arrays. It
packs those of matrix products for itself once more.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlflow_safeflavor.errors import PlacementError, StructureError
from mlflow_safeflavor.graph.graph import Graph
from mlflow_safeflavor.graph.onnx_file import parse_model, write_model

__all__ = ["Session", "require_installed"]

# OpenVINO's names of a dtype: as a hint, and as a capability of a CPU.
_NAMES = {"float32": ("f32", "FP32"), "bfloat16": ("bf16", "BF16")}


def require_installed() -> None:
    """Raise ``PlacementError`` if OpenVINO is not installed."""
    if importlib.util.find_spec("openvino") is None:
        raise PlacementError(
            "OpenVINO is not installed",
            where="engine",
            hint="pip install 'mlflow-safeflavor[openvino]'",
        )


_INT32 = np.iinfo(np.int32)

_importing = threading.Lock()


def _imported() -> Any:
    """OpenVINO, imported as if its telemetry were not installed."""
    # With it, an import starts a process that reports to OpenVINO's makers, and writes to the home.
    with _importing:
        if "openvino" not in sys.modules:
            there = sys.modules.pop("openvino_telemetry", None)
            # None rules an import out.
            sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
            try:
                importlib.import_module("openvino")
            finally:
                del sys.modules["openvino_telemetry"]
                sys.modules.update({"openvino_telemetry": there} if there else {})
        return importlib.import_module("openvino")


class Session:
    """A graph with its weights, ready to run; safe from many threads, which take turns.

    Args:
        graph: Checked.
        weights: Name → array, of the dtype and shape that the graph says; kept alive and never
            written.
        threads: Of one run.
        dtype: In which it computes; outputs are float32 all the same.

    Raises:
        PlacementError: This CPU has no arithmetic for the dtype.
        StructureError: OpenVINO does not know a node, or its nodes do not fit each other.
    """

    name = "openvino"

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, np.ndarray],
        *,
        threads: int,
        dtype: str = "float32",
    ) -> None:
        openvino = _imported()
        self.graph, self.dtype = graph, dtype
        self.tolerance = {"float32": 1e-4, "bfloat16": 5e-2}[dtype]
        self._weights = {name: weights[name] for name in graph.weights}
        core = openvino.Core()
        hint, capability = _NAMES[dtype]
        # The hint is only one: without the arithmetic OpenVINO takes float32 without a word.
        if capability not in (known := core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
            raise PlacementError(
                "This CPU has no arithmetic for the dtype, so that OpenVINO would silently take "
                "another",
                where="dtype",
                wanted=dtype,
                found=f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}: {', '.join(known)}",
                hint="leave dtype out",
            )
        options = {
            # In its default mode, PERFORMANCE, the plugin may choose a narrower dtype by itself.
            "EXECUTION_MODE_HINT": "ACCURACY",
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": False,  # other models and the tokenizer run on these cores, too
        }
        try:
            model = core.read_model(_without_weights(graph))
            for parameter in model.get_parameters():
                # Constants before it compiles, so that their products are packed.
                if (name := parameter.get_friendly_name()) in self._weights:
                    parameter.output(0).replace(_constant(self._weights[name]).output(0))
                    model.remove_parameter(parameter)
            model.validate_nodes_and_infer_types()
            self._compiled = core.compile_model(model, "CPU", options)
        except Exception as error:  # it has one class for all that it refuses
            raise StructureError(
                "OpenVINO does not take the graph of the model",
                where="graph.onnx",
                found=" ".join(str(error).split())[:400],
                hint="leave the engine out, or `pip install --upgrade openvino`",
            ) from error
        self._outputs = [self._compiled.output(f"output.{name}") for name in graph.outputs]
        self._request, self._lock = self._compiled.create_infer_request(), threading.Lock()

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the forward.

        Raises:
            OverflowError: A number has more than 32 bits, of which OpenVINO would drop the others.
            Exception: OpenVINO's own, where a node cannot take what it is given.
        """
        for name, array in inputs.items():
            if (
                array.dtype == np.int64
                and array.size
                and not _INT32.min <= array.min() <= array.max() <= _INT32.max
            ):
                raise OverflowError(
                    f"{name} has numbers of more than 32 bits, which OpenVINO does not compute with"
                )
        # One stream: others would wait anyway, each with a request's memory of its own.
        with self._lock:
            found = self._request.infer({f"input.{name}": array for name, array in inputs.items()})
        return {
            name: found[output]
            for name, output in zip(self.graph.outputs, self._outputs, strict=True)
        }


def _without_weights(graph: Graph) -> bytes:
    """The checked model as it was read, with weights as inputs: there is no file left to open."""
    model = parse_model(graph.content)
    parts = model["graph"]
    weights = [tensor for tensor in parts["initializer"] if tensor["name"] in graph.weights]
    parts["initializer"] = [
        tensor for tensor in parts["initializer"] if tensor["name"] not in graph.weights
    ]
    for tensor in weights:
        facts = {
            "elem_type": tensor["data_type"],
            "shape": {"dim": [{"dim_value": size} for size in tensor["dims"]]},
        }
        parts["input"].append({"name": tensor["name"], "type": {"tensor_type": facts}})
    return write_model(model)


def _constant(array: np.ndarray) -> Any:
    """A constant that is an array's own memory, which the session keeps alive."""
    from openvino.op import Constant

    if not array.size:
        return Constant(array)  # no bytes to share
    # OpenVINO takes no read-only array, though it does not write there; the pages stay read-only,
    # so that a write would end the process and not change a weight.
    memory = (ctypes.c_char * array.nbytes).from_address(array.ctypes.data)
    return Constant(np.frombuffer(memory, array.dtype).reshape(array.shape), shared_memory=True)
