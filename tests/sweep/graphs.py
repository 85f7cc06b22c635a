"""Record the forward of every small encoder-like class of transformers; compare it with the graph.

    make graphs                                                  all of them
    cd tests; python -m sweep.graphs --only 'Bert|ViT'           some of them, by class name

Each class is built as in ``run.py``, and its forward recorded and proven as ``save_model`` does it.
The graph then answers fresh inputs of other sizes, near to the module's outputs or it is a bug.
Rows go to ``docs/sweep/graphs.jsonl`` as they are done, and are not done again; ``graphs.md`` is
made of them at the end. It ends with 1 if any graph that was proven answered otherwise, or if
something broke that is no refusal.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import select
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweep import inputs, report, run, shrink  # isort: skip  (run sets the environment first)

import numpy as np
import torch
import transformers

from mlflow_safeflavor.graph.graph import Graph
from mlflow_safeflavor.graph.onnx_engine import Session
from mlflow_safeflavor.module.engine import named_tensors
from mlflow_safeflavor.module.slots import find_slots
from mlflow_safeflavor.save import graph as recording

HERE = Path(__file__).resolve().parent
TABLES = HERE.parents[1] / "docs" / "sweep"
CPU_SECONDS = 60  # for one class
MOST_CLASSES = 30  # of one process: torch.export keeps what it has seen
FRESH = 12
"""Inputs of other sizes that a graph is asked, beyond those it was proven on."""

KINDS = (
    *(
        "SequenceClassification",
        "TokenClassification",
        "QuestionAnswering",
        "MaskedLM",
        "ImageClassification",
    ),
    *(
        "Model",
        "AudioClassification",
        "MultipleChoice",
        "PreTraining",
        "AudioFrameClassification",
        "XVector",
        "CTC",
    ),
    *(
        "NextSentencePrediction",
        "MaskedImageModeling",
        "VideoClassification",
        "SemanticSegmentation",
    ),
    *("DepthEstimation", "ObjectDetection", "Backbone", "Encoder", ""),
)
"""Ends of class names, in the order in which they are looked at."""

WRITES = re.compile(
    "CausalLM|LMHead|ConditionalGeneration|Decoder|Seq2Seq|TextToWaveform|TextToSpectrogram|ForGeneration|MTModel$"
    "|PreTrainedModel"
)
"""Classes that write token by token: they stay with the module, see docs/limits.md."""

ENCODERS = re.compile("MaskedLM|ImageClassification|AudioClassification|ForCTC")
"""A model type is an encoder where transformers has such a class of it.

Its classes come first, and are counted.
"""

Tensors = dict[str, torch.Tensor]


def encoders(only: str = "") -> list[tuple[str, str]]:
    """Class name and model type of all that do not write, those first that are served most."""
    known = shrink.architectures()
    found = [
        item for item in known.items() if not WRITES.search(item[0]) and re.search(only, item[0])
    ]
    served = encoder_types(known)
    return sorted(
        found,
        key=lambda item: (
            item[1] not in served,
            next(i for i, kind in enumerate(KINDS) if item[0].endswith(kind)),
        ),
    )


def encoder_types(known: Mapping[str, str]) -> set[str]:
    """Model types that have an encoder's class, of class name → model type."""
    return {model_type for name, model_type in known.items() if ENCODERS.search(name)}


# --- one class


def check(class_name: str, model_type: str) -> dict[str, Any]:
    """The whole story of one class; ``result`` is one of

    - ``proven``: recorded, proven by the package, and near on all fresh inputs;
    - ``refused``: the package stored no graph, ``reason`` says why;
    - ``left out``: the class cannot be built small or fed, ``reason`` says why;
    - ``differs``: a bug.
    """
    begin = time.perf_counter()
    row: dict[str, Any] = {"class": class_name, "model_type": model_type}
    try:
        module, arrays, _, reason = run.original(class_name, model_type)
        if module is not None and arrays is not None:
            reason = run._not_repeatable(module, arrays, torch.float32)
    except Exception as error:  # each class has its own way to fail
        module, reason = None, f"{type(error).__name__}: {error}".splitlines()[0][:240]
    if module is None or arrays is None or reason:
        row |= {"result": "left out", "reason": reason}
    else:
        row |= _recorded(module.eval().requires_grad_(False), inputs.tensors(arrays, torch.float32))
    return row | {"seconds": round(time.perf_counter() - begin, 1)}


def _recorded(module: torch.nn.Module, example: Tensors) -> dict[str, Any]:
    examples = list(_examples(module, example))
    slots = find_slots(module)
    try:
        graph, proof = recording.record(module, slots, {}, examples)
    except recording.Refusal as refusal:
        return {"result": "refused", "reason": str(refusal)[:400]}
    except Exception as error:
        return {"result": "differs", "reason": f"{type(error).__name__}: {error}"[:2000]}
    facts = proof["onnx"]
    compared, reason = _compared(module, Session(graph, {}, threads=1), graph, examples[0])
    shapes = {known.name: [str(size) for size in known.shape] for known in graph.inputs}
    same = [name for name in ("threads", "batch", "padding") if getattr(facts, name) is False]
    known = {
        "nodes": len(graph.nodes),
        "proven_on": facts.inputs,
        "fresh": compared,
        "inputs": shapes,
    }
    known |= {"difference": facts.difference, "other_bits": same}
    if reason is None and not compared:
        return {
            "result": "left out",
            "reason": "the module takes none of the fresh inputs",
            **known,
        }
    return (
        {"result": "differs", "reason": reason, **known}
        if reason
        else {"result": "proven", **known}
    )


def _examples(module: torch.nn.Module, example: Tensors) -> Iterator[Tensors]:
    """The example and, as served, one row of it and a shorter one, if the module takes them."""
    yield example
    for rows, length in ((1, None), (2, inputs.LENGTH - 3)):
        other = {name: _cut(name, tensor, rows, length) for name, tensor in example.items()}
        if _answer(module, other) is not None:
            yield other


TEXT = frozenset(("input_ids", "attention_mask", "token_type_ids", "bbox", "mm_token_type_ids"))


def _cut(name: str, tensor: torch.Tensor, rows: int, length: int | None) -> torch.Tensor:
    cut = tensor[:rows]
    return (
        cut[:, :length].clone()
        if name in TEXT and tensor.shape[1:2] == (inputs.LENGTH,)
        else cut.clone()
    )


def _answer(module: torch.nn.Module, given: Tensors) -> Tensors | None:
    try:
        with torch.inference_mode():
            return named_tensors(module(**given))
    except Exception:  # the module does not take such sizes
        return None


TOLERANCE = 1e-4
"""Of an output's largest value, and absolutely."""


def _compared(
    module: torch.nn.Module, session: Session, graph: Graph, example: Tensors
) -> tuple[int, str | None]:
    """How many fresh inputs both answered, and the first that they answered differently."""
    compared = 0
    for given in _fresh(graph, example):
        wanted = _answer(module, given)
        if wanted is None:
            continue
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
        try:
            found = session({name: tensor.numpy() for name, tensor in given.items()})
        except Exception as error:
            return compared, f"on {shapes}: {type(error).__name__}: {error}"[:2000]
        unequal = [
            name
            for name in wanted
            if name not in found or not _near(wanted[name].numpy(), found[name])
        ]
        if unequal or wanted.keys() != found.keys():
            return compared, f"on {shapes}: {', '.join(unequal) or 'other outputs'}"
        compared += 1
    return compared, None


def _near(wanted: np.ndarray, found: np.ndarray) -> bool:
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return False
    if wanted.dtype.kind != "f":
        return bool(np.array_equal(wanted, found))
    plain = np.isfinite(wanted)
    allowed = TOLERANCE * (1 + float(np.abs(wanted[plain]).max(initial=0)))
    return bool(np.array_equal(wanted[~plain], found[~plain], equal_nan=True)) and bool(
        (np.abs(wanted[plain] - found[plain]) <= allowed).all()
    )


def _fresh(graph: Graph, example: Tensors) -> Iterator[Tensors]:
    """Values and sizes that are drawn anew, apart from ``graph/proof.py``.

    That is what is tested.
    """
    draw = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    for i in range(FRESH):
        like = [
            known
            for k in graph.inputs
            for known in zip(k.shape, example[k.name].shape, strict=True)
        ]
        sizes = {size: found for size, found in like if isinstance(size, str)}
        # All of them, or rows and lengths alone: many models take one size of images.
        other = [name for name in sizes if i % 2 or name in ("rows", "length")] if i else []
        sizes |= {name: draw.randint(1, 48) for name in other}
        shapes = {
            k.name: tuple(int(sizes.get(str(size), size)) for size in k.shape) for k in graph.inputs
        }
        yield {
            name: _values(name, shapes[name], tensor, generator) for name, tensor in example.items()
        }


def _values(
    name: str, shape: Sequence[int], like: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    if name == "attention_mask" and len(shape) == 2:
        real = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
        return (torch.arange(shape[1])[None] < real).to(like.dtype)
    if like.is_floating_point():
        return torch.randn(shape, generator=generator) * 0.5
    # ids that the model knows
    chosen = torch.randint(like.numel(), tuple(shape), generator=generator)
    values = like.reshape(-1)[chosen]
    if name == "bbox" and shape[-1] == like.shape[-1]:  # its corners go together
        values = like.reshape(-1, shape[-1])[chosen[..., 0] % like.shape[:-1].numel()]
    if name == "input_ids" and len(shape) == 2 and len(like.shape) == 2:
        # A text ends with its own token, and some models look for it.
        values[values == like[0, -1]] = like[0, 0]
        values[:, -1] = like[0, -1]
    return values


# --- all of them


class Worker:
    """A process that is told classes and answers with rows.

    Another one takes over where it dies.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.asked = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            with self.process:  # closes its pipes, and waits
                self.process.kill()
            self.process = None

    def ask(self, class_name: str, model_type: str) -> dict[str, Any]:
        """The row of a class."""
        if self.asked >= MOST_CLASSES:
            self.__exit__()
        if self.process is None:
            self.asked = 0
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "sweep.graphs", "--worker"], cwd=HERE.parent,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        self.asked += 1
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(class_name, model_type, file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], run.PATIENCE)
        if line := self.process.stdout.readline() if ready else "":
            return dict(json.loads(line))
        ended = self.process.wait() if ready else None
        self.__exit__()
        late = ended in (None, -signal.SIGXCPU)
        reason = f"more than {CPU_SECONDS} seconds" if late else f"the process died: {ended}"
        return {"class": class_name, "model_type": model_type,
            "result": "left out" if late else "differs",
                "reason": reason, "seconds": CPU_SECONDS}  # fmt: skip


def work() -> None:
    """Answer the classes that standard input names.

    The kernel ends this process at one that takes too long.
    """
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # some classes print
    for line in sys.stdin:
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + CPU_SECONDS, resource.RLIM_INFINITY))
        print(json.dumps(check(*line.split())), file=answers, flush=True)


def sweep(wanted: Sequence[tuple[str, str]], results: Path) -> None:
    """Check those that have no row yet, and write each row as soon as it is known."""
    done = {row["class"] for row in report.read(results)} if results.exists() else set()
    with Worker() as worker, results.open("a", encoding="utf-8") as file:
        for class_name, model_type in wanted:
            if class_name not in done:
                row = worker.ask(class_name, model_type)
                print(json.dumps(row), file=file, flush=True)
                print(
                    row["result"],
                    row["class"],
                    row.get("reason", "")[:100],
                    row["seconds"],
                    sep="\t",
                    flush=True,
                )


# --- the table


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Counts, a table by kind of class, every class that is proven, and why the others are not."""
    results = ("proven", "refused", "left out", "differs")
    counts = {kind: dict.fromkeys(results, 0) for kind in [*KINDS, "all"]}
    for row in rows:
        kind = next(kind for kind in KINDS if row["class"].endswith(kind))
        counts[kind][row["result"]] += 1
        counts["all"][row["result"]] += 1
    known, seen = encoders(), {row["class"] for row in rows}
    served = encoder_types(dict(known))
    those = {name for name, model_type in known if model_type in served}
    lines = [
        "# Graphs of the sweep",
        "",
        f"{len(seen & those)} of {len(those)} classes of encoders and ",
    ]
    lines[-1] += (
        f"{len(seen - those)} of {len(known) - len(those)} others (decoders that classify, "
        "detectors, parts "
    )
    lines[-1] += (
        f"of models), transformers {transformers.__version__}, torch "
        f"{torch.__version__.partition('+')[0]}. "
    )
    fresh = sum(row.get("fresh", 0) for row in rows)
    proven = sum(row.get("proven_on", 0) for row in rows)
    lines[-1] += (
        f"Proven on {proven:,} inputs when recorded, and compared on {fresh:,} fresh ones "
        "afterwards."
    )
    lines += [
        "",
        "| kind | proven | refused, with a reason | left out | stored but unequal |",
        "|---|---|---|---|---|",
    ]
    for kind, found in counts.items():
        if any(found.values()):
            lines.append(
                f"| {kind or 'others'} | " + " | ".join(str(found[name]) for name in results) + " |"
            )
    lines += [
        "",
        "## Proven",
        "",
        "| class | nodes | inputs | proven on | fresh | within | other bits for |",
    ]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["class"]):
        if row["result"] == "proven":
            shapes = ", ".join(
                f"{name} {' × '.join(shape)}" for name, shape in row["inputs"].items()
            )
            cells = (
                row["class"],
                row["nodes"],
                shapes,
                row["proven_on"],
                row["fresh"],
                f"{row['difference']:.0e}",
            )
            lines.append(f"| {' | '.join(map(str, cells))} | {', '.join(row['other_bits'])} |")
    for result, title in (
        ("differs", "Stored but unequal"),
        ("refused", "Refused"),
        ("left out", "Left out"),
    ):
        lines += _grouped(rows, result, title)
    return "\n".join(lines) + "\n"


def _grouped(rows: Sequence[Mapping[str, Any]], result: str, title: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row["result"] == result:
            reason = report._short(re.sub(r"\b[us]\d+\b", "s", row.get("reason", "")))
            groups.setdefault(reason, []).append(row["class"])
    body = [f"- {reason}: {', '.join(sorted(names))}" for reason, names in sorted(groups.items())]
    return ["", f"## {title}", "", *body] if body else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression on class names")
    parser.add_argument("--results", type=Path, default=TABLES / "graphs.jsonl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return 0
    sweep(encoders(arguments.only), arguments.results)
    rows = report.read(arguments.results)
    arguments.results.with_suffix(".md").write_text(as_text(rows), encoding="utf-8")
    wrong = [row["class"] for row in rows if row["result"] == "differs"]
    proven = sum(row["result"] == "proven" for row in rows)
    print(f"{len(rows)} classes, {proven} proven, {len(wrong)} wrong: {' '.join(wrong)}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
