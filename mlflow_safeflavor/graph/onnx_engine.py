"""A graph in ONNX Runtime: arrays in, arrays out, and no torch.

A session gets the checked bytes of the graph, and maps the files of weights whose bytes were
compared; where these have no name, it gets arrays. Its memory comes from one arena of this process
with an upper bound, so that a graph that asks for more is an error and not the end of the process.

It packs what it multiplies with, about half of a transformer's weights, into memory of its own,
since packed ones are faster for short texts and give other last bits: never without. For processes
side by side see ``packed_weights``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.weights_files import HeldFile, require_unchanged
from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.graph.graph import Graph
from mlflow_safeflavor.graph.onnx_file import parse_model, write_model
from mlflow_safeflavor.graph.packed_weights import PackedWeights
from mlflow_safeflavor.machine import available_memory, give_back

__all__ = ["RUNTIME", "Session"]


_NO_REPORTS = "ORT_DISABLE_TELEMETRY"


@contextmanager
def _unreported() -> Iterator[None]:
    # Since release 1.32 ONNX Runtime tells its makers what sessions do, by an id of the machine
    # that it keeps in the home folder, unless this is set while it is imported. Who wants that
    # sets it to 0.
    before = os.environ.get(_NO_REPORTS)
    os.environ.setdefault(_NO_REPORTS, "1")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_REPORTS]


with _unreported():
    import onnxruntime

RUNTIME = f"onnxruntime {onnxruntime.__version__}"

_lock = threading.Lock()
_most: int | None = None


def _limit_memory() -> int:
    """Bound the memory of all sessions of this process together; returns the bound in bytes."""
    global _most
    with _lock:
        if _most is None:
            # Once: ONNX Runtime registers one arena a process, and refuses a second. A quarter is
            # left to Python, and to kernels that allocate without the arena (TopK, NonZero).
            most = available_memory() // 4 * 3
            place = onnxruntime.OrtMemoryInfo(
                "Cpu",
                onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR,
                0,
                onnxruntime.OrtMemType.DEFAULT,
            )
            # Strategy 0 doubles from 1 MB. With pieces of just the size that was asked for (1) none
            # fits the next shape, and the arena of MiniLM grew to 42 MB instead of 20.
            arena = onnxruntime.OrtArenaCfg({"max_mem": most, "arena_extend_strategy": 0})
            onnxruntime.create_and_register_allocator(place, arena)
            _most = most
        return _most


# Optimizers that compute while a session is made, outside the arena and for as long as it takes.
# Without them sessions are made in a third of the time, weights that are transposed are not copied
# (42 MB for MiniLM), and forwards take as long: transposing and normalising are fused into the
# products all the same.
_GREEDY = ("ConstantFolding", "ConvBNFusion", "ConvMulFusion")

_FOLDER = "session.model_external_initializers_file_folder_path"
_WITH_PACKED_WEIGHTS = {
    "session.save_external_prepacked_constant_initializers": "1",
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
}


# Microseconds that an idle thread waits busily for the next node before it sleeps, and how many
# pauses at most it makes between two looks.
#
# Of MiniLM on two cores, one row of 12 tokens after a pause took 6.0 ms with 50, 4.8 with 200, 4.3
# with these and 4.0 with ONNX Runtime's own wait, some 20 ms, in which a core does nothing else.
# Beside a process that wants a core a row of 182 tokens took 47, 60, 55 and 74 ms
# (benchmarks/threads.py --engine onnx).
_SPIN, _PAUSES = 400, 8


class Session:
    """A graph with its weights, ready to run.

    Safe from many threads, as ONNX Runtime lets several run at once.

    Args:
        graph: Checked.
        weights: Name → array, of the dtype and shape that the graph says; kept alive as long as
            they are used, and never written.
        threads: Of one run. They sleep soon when they have nothing to do; see ``_SPIN``.
        files: Files of weights by the names that the graph has for them, to be mapped by ONNX
            Runtime itself. Of arrays it makes a copy, as long as it makes a session, which takes
            twice the time and the memory.
        packed: Where this host keeps the packed weights, if it may.

    Raises:
        StructureError: ONNX Runtime has no kernel for a node, or its nodes do not fit each other or
            the memory.
        IntegrityError: Another file has taken the name of one of ``files``.
    """

    name, dtype = "onnx", "float32"
    # Sums in another order differ by a few units in the last place of their largest term, 1.2e-7 of
    # it, and terms that nearly cancel make more of that: of one text of 512 tokens torch's MiniLM,
    # on a CPU with AVX-512, was 2.4e-5 off what it gives in float64, and this engine 4e-6. A wrong
    # operator is far beyond.
    tolerance = 1e-4

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, np.ndarray],
        *,
        threads: int,
        files: Mapping[str, HeldFile] | None = None,
        packed: PackedWeights | None = None,
    ) -> None:
        most = _limit_memory()
        self.graph = graph
        self._threads, self._files, self._packed = threads, files or {}, packed
        self._weights = {name: weights[name] for name in graph.weights}
        # Fusions may copy a constant into each node that uses it, while the session is made.
        if graph.reused > most:
            raise _refused(
                f"constants that are used several times, {graph.reused} bytes in all: each use "
                "may be a copy"
            )
        nbytes = sum(array.nbytes for array in self._weights.values())
        shared = None if packed is None else packed.open(self._map, self._save, nbytes)
        self._session = shared or self._pack()
        if shared:
            self._weights = {}

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the forward.

        Raises ONNX Runtime's own exceptions, where a node cannot take what it is given.
        """
        if self._packed is not None and (shared := self._packed.found(self._map)):
            # Forwards that run keep the old session until they end; its packed weights go with it.
            self._session, self._weights = shared, {}
            give_back()
        found = self._session.run(None, {f"input.{name}": array for name, array in inputs.items()})
        return dict(zip(self.graph.outputs, found, strict=True))

    def _pack(self, saved: Path | None = None) -> Any:
        """A session that packs its weights, also written to a file with the weights beside it."""
        options = self._options()
        # Otherwise a file that is both is read as ONNX Runtime's own format, which is not checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        if saved is not None:
            options.optimized_model_filepath = str(saved)
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{saved.stem}.data"
            )
            for name, value in _WITH_PACKED_WEIGHTS.items():
                options.add_session_config_entry(name, value)
        files = self._files.values()
        by_name = bool(files) and all(file.has_name() for file in files)
        try:
            # Options point to shared values without holding them.
            values = {} if by_name else self._share(options)
            session = onnxruntime.InferenceSession(
                self._locate(options) if by_name else self.graph.content,
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=list(_GREEDY),
            )
        except Exception as error:  # it has a class for each of its codes
            raise _refused(str(error).strip().partition("\n")[0][:400]) from error
        del values
        if by_name:
            require_unchanged(files, names=True)
        return session

    def _locate(self, options: onnxruntime.SessionOptions) -> bytes:
        """Let ONNX Runtime find the files of weights; the model with their places in it."""
        folder = Path(os.path.commonpath([file.name.parent for file in self._files.values()]))
        options.add_session_config_entry(_FOLDER, str(folder))
        places = {
            name: file.name.relative_to(folder).as_posix() for name, file in self._files.items()
        }
        if all(name == place for name, place in places.items()):
            return self.graph.content
        # Copies of several files have a folder each.
        model = parse_model(self.graph.content)
        for tensor in model["graph"]["initializer"]:
            for pair in tensor["external_data"]:
                if pair["key"] == "location":
                    pair["value"] = places[pair["value"]]
        return write_model(model)

    def _share(self, options: onnxruntime.SessionOptions) -> dict[str, onnxruntime.OrtValue]:
        """Give ONNX Runtime the weights as arrays; these, which must outlive the options."""
        values = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
            for name, array in self._weights.items()
        }
        options.add_external_initializers(list(values), list(values.values()))
        for name, value in values.items():  # or what is not packed would stay copied
            options.add_initializer(name, value)
        return values

    def _save(self, path: Path) -> None:
        """Write the graph as it is run, and beside it its weights, packed."""
        self._pack(path)
        give_back()

    def _map(self, path: Path) -> Any:
        """A session of what ``_save`` wrote, whose weights are the file's pages."""
        options = self._options()
        # Written as it is run: the packed weights belong to exactly these nodes.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def _options(self) -> onnxruntime.SessionOptions:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self._threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        # Its log of fusions is for its makers; errors are raised.
        options.log_severity_level = 4
        # The arena of ``_limit_memory``; otherwise each session has one of its own, unbounded.
        options.add_session_config_entry("session.use_env_allocators", "1")
        # Not from the arena, which keeps until the end of the process what it once had.
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(_SPIN))
        options.add_session_config_entry("session.intra_op.spin_backoff_max", str(_PAUSES))
        return options


def _refused(found: str) -> StructureError:
    return StructureError(
        "ONNX Runtime does not take the graph of the model",
        where="graph.onnx",
        found=found,
        hint=FETCH_AGAIN,
    )
