"""The graph of an artifact, ``graph.onnx``; its proof or the reason for none, ``graph.json``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.artifact.json_files import write_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.errors import IntegrityError, StructureError
from mlflow_safeflavor.graph.check import read
from mlflow_safeflavor.graph.graph import Graph
from mlflow_safeflavor.graph.onnx_file import Malformed
from mlflow_safeflavor.graph.weights import map_weights

if TYPE_CHECKING:
    import numpy as np

    from mlflow_safeflavor.graph.proof import Facts

__all__ = [
    "format_graph",
    "keeps_bits",
    "open_graph",
    "read_graph",
    "reason_against",
    "write_graph",
    "write_reason",
]

_VERSION = 1


def write_graph(graph: Graph, facts: Mapping[str, Facts], layout: Layout) -> None:
    """Write a graph, and its proof with each engine."""
    layout.graph.write_bytes(graph.content)
    proof = {engine: seen.to_json() for engine, seen in facts.items()}
    write_json(layout.graph_facts, {"version": _VERSION, "proof": proof})


def write_reason(reason: str, layout: Layout) -> None:
    """Write why there is no graph."""
    write_json(layout.graph_facts, {"version": _VERSION, "reason": reason})


def _read_facts(layout: Layout) -> dict[str, Any]:
    content = layout.read_json(layout.graph_facts)
    # A graph without its proof, or a proof without its graph, is a file taken away: requests must
    # not go to the module instead, with other pins and other bits.
    kinds = {"reason": str, "proof": dict}
    sound = isinstance(content, dict) and content.get("version") == _VERSION and len(content) == 2
    kind = next(
        (name for name in kinds if sound and isinstance(content.get(name), kinds[name])), None
    )
    there = layout.graph.exists()
    if (
        kind is None
        or not content[kind]
        or there != (kind == "proof")
        or (there and not _is_proof(content["proof"]))
    ):
        raise IntegrityError(
            "The proof of the graph is malformed",
            where=layout.name_of(layout.graph_facts),
            wanted=f"a proof beside {layout.graph.name}, and a reason where there is none",
            hint=FETCH_AGAIN,
        )
    return {kind: content[kind]}


# Keys and types exactly: ``inspect`` prints these, and a text could hold a terminal's codes.
def _is_proof(proof: Mapping[str, Any]) -> bool:
    return {"onnx"} <= proof.keys() <= _TOLD.keys() and all(map(_is_sound, proof.values()))


def _is_sound(facts: Any) -> bool:
    return (
        isinstance(facts, dict)
        and facts.keys() == {"dtype", "inputs", "difference", *_HELD}
        and facts["dtype"] in ("float32", "bfloat16")
        and type(facts["inputs"]) is int
        and type(facts["difference"]) is float
        and all(facts[name] is None or type(facts[name]) is bool for name in _HELD)
    )


def reason_against(layout: Layout) -> str | None:
    """Why an artifact has no graph, in words.

    None if it has one, which is not looked at any closer.
    """
    if not (layout.graph_facts.exists() or layout.graph.exists()):
        return "it was saved without one"
    reason = _read_facts(layout).get("reason")
    return reason if reason is None or isinstance(reason, str) else str(reason)


def format_graph(layout: Layout) -> dict[str, str]:
    """The proof of a graph with each engine, in words; the graph itself is not read."""
    if reason := reason_against(layout):
        return {"graph": f"none: {reason}"}
    proof = _read_facts(layout)["proof"]
    return {name: _format(proof[engine]) for engine, name in _TOLD.items() if engine in proof}


def _format(facts: Mapping[str, Any]) -> str:
    held = [words for name, words in _HELD.items() if facts[name] is True]
    lost = [words for name, words in _HELD.items() if facts[name] is False]
    bits = f"same bits for {', '.join(held)}" if held else "bits depend on everything"
    not_held = f"; other bits for {', '.join(lost)}" if lost and held else ""
    dtype = f" in {facts['dtype']}" if facts["dtype"] != "float32" else ""
    return (
        f"{bits}{not_held}; within {facts['difference']:.1g} of the module on {facts['inputs']} "
        f"inputs{dtype}"
    )


def keeps_bits(layout: Layout, engine: str, dtype: str) -> bool:
    """Whether all bits of a row were seen to be the same in any batch and with any padding."""
    # padding is None for models without an attention mask, which pad nothing
    seen = _read_facts(layout).get("proof", {}).get(engine, {})
    return seen.get("dtype") == dtype and seen["batch"] is True and seen["padding"] is not False


_TOLD = {"onnx": "graph", "openvino": "graph in OpenVINO"}
_HELD = {"threads": "any number of threads", "batch": "any batch", "padding": "any padding"}


def read_graph(layout: Layout) -> Graph:
    """Read and check a graph.

    Raises:
        StructureError: It is not one that may be run; names the node.
    """
    try:
        return read(layout.read_bytes(layout.graph))
    except Malformed as error:
        raise StructureError(
            "The graph of the model is not one that may be run",
            where=layout.name_of(layout.graph),
            found=str(error)[:1000],
            hint=FETCH_AGAIN,
        ) from None


def open_graph(files: Collection[str], layout: Layout) -> tuple[Graph, dict[str, np.ndarray]]:
    """Read and check a graph, and map its weights.

    Args:
        files: Names of the artifact's files of weights, whose content was compared with what was
            saved.
        layout: Says where they are held.

    Raises:
        StructureError: See ``read_graph``.
        IntegrityError: A tensor is in no such file.
    """
    graph = read_graph(layout)
    return graph, map_weights(graph.weights, files, layout)
