"""Save every small architecture of transformers, load it in a clean process, compare everything.

    make sweep                                                all of them, on two cores
    cd tests; python -m sweep.run --only 'Bert|Llama'         some of them, by class name
    cd tests; python -m sweep.run --jobs 4 --results x.jsonl  shared among four processes

Results go to ``docs/sweep/results.jsonl``, one line a class as it is done, and in the end to
``results.md``; of some classes to ``some.jsonl`` and ``some.md``. The package's own
``proven_classes.txt`` then says of these classes what was seen. It ends with 1 if any class came
back different, or if the package raised an alarm about a sound one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast
from unittest import mock

HERE = Path(__file__).resolve().parent
TABLES = HERE.parents[1] / "docs" / "sweep"
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import mlflow_safeflavor  # noqa: E402
from mlflow_safeflavor.artifact import trust  # noqa: E402
from mlflow_safeflavor.environment import files as environment_files  # noqa: E402
from mlflow_safeflavor.environment.record import record  # noqa: E402
from mlflow_safeflavor.errors import SafeFlavorError, WeightsError  # noqa: E402
from mlflow_safeflavor.module import build, constructor  # noqa: E402
from sweep import facts, inputs, report, shrink  # noqa: E402

DTYPES = ("float32", "bfloat16")
CPU_SECONDS = 60  # for one class to be made and run; other processes on the machine do not count
PATIENCE = 600  # seconds until a clean process that says nothing is given up


# --- the original


def original(
    class_name: str, model_type: str
) -> tuple[torch.nn.Module | None, inputs.Arrays | None, str, str]:
    """A small module with its own values, inputs for it, the rule that made it, what failed."""
    built: tuple[torch.nn.Module, str] | None = None
    problems = []
    for rule, config in shrink.configs(class_name, model_type):
        try:
            module = (
                _make(getattr(transformers, class_name), config) if config is not None else None
            )
        except ImportError as error:
            return None, None, rule, f"not installed: {_missing(error)}"
        except TimeoutError:
            raise
        except Exception as error:  # each class has its own way to refuse a config
            module, rule = None, f"{rule}: {type(error).__name__}: {error}"
        if module is None:
            problems.append(rule)
            continue
        arrays, problem = inputs.find_inputs(module)
        if arrays is not None:
            return module, arrays, rule, ""
        built = built or (module, rule)
        problems.append(f"{rule}: {problem}")
    problem = problems[0].splitlines()[0][:240] if problems else "no rule"
    return (built[0], None, built[1], problem) if built else (None, None, "", problem)


def _missing(error: ImportError) -> str:
    found = re.search(r"requires the (\S+) library", str(error))
    return found[1] if found else str(error)[:80]


def _make(cls: Any, config: Any) -> torch.nn.Module | None:
    """A seeded module, unless it would be too large: built without memory first, to see."""
    with torch.device("meta"):
        count = sum(p.numel() for p in cls(copy.deepcopy(config)).parameters())
    if count > shrink.MOST_PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    module = cls(config).eval()
    _perturb(module)
    return module


@torch.no_grad()
def _perturb(module: torch.nn.Module) -> None:
    """No two biases alike: a fresh module is full of zeros and ones, which would hide a swap."""
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * 0.02)


def cast_reference(
    module: transformers.PreTrainedModel, dtype: torch.dtype
) -> transformers.PreTrainedModel:
    """What a cast of the original is, by transformers' own rules and not by this package's.

    As ``from_pretrained(dtype=…)`` decides: parameters and persistent buffers that the class's
    float32 islands match are float32; everything else that is floating point has the dtype the
    constructor gives it when ``dtype`` is torch's default.
    """
    with _default_dtype(dtype):
        made = type(module)(copy.deepcopy(module.config))
    dtypes = {path: tensor.dtype for path, _, tensor in facts.tensors_of(made)}
    plan = list(module._get_dtype_plan(dtype))
    islands = transformers.core_model_loading.build_glob_alternation(plan)[0] if plan else None
    stored = set(module.state_dict(keep_vars=True))
    cast = copy.deepcopy(module)
    for path, _, tensor in list(facts.tensors_of(cast)):
        if tensor.is_floating_point():
            island = islands is not None and path in stored and islands.search(path)
            tensor.data = tensor.data.to(
                torch.float32 if island else dtypes.get(path, tensor.dtype)
            )
    return cast


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- the clean process


class CleanProcess:
    """A fresh interpreter that loads what it is told to, and never saw an original."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> CleanProcess:
        self._start()  # it imports while the first original is made
        return self

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "sweep.clean"], cwd=HERE.parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            with self.process:  # closes its pipes, and waits
                self.process.kill()
            self.process = None

    def ask(self, artifact: Path, dtype: str) -> None:
        """Begin to load; ``reply`` waits for it."""
        if self.process is None:
            self._start()
        assert self.process is not None
        print(
            json.dumps({"artifact": str(artifact), "dtype": dtype}),
            file=self.process.stdin,
            flush=True,
        )

    def reply(self) -> dict[str, Any]:
        """What the artifact held there, or its error."""
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.__exit__()
            return {"error": "crash", "message": "no answer" if not ready else "the process died"}
        return dict(json.loads(line))


# --- one class


def check(class_name: str, model_type: str, clean: CleanProcess, folder: Path) -> dict[str, Any]:
    """The whole story of one class; ``result`` in each dtype is one of

    - ``equal``: inventory and outputs bit for bit;
    - ``left out``: the class itself cannot take part, ``reason`` says why;
    - ``refused``: the package refused it by a named error, ``reason`` says which;
    - ``differs``: a bug.
    """
    begin = time.perf_counter()
    row: dict[str, Any] = {"class": class_name, "model_type": model_type}
    try:
        with _time_limit():
            module, arrays, row["rule"], reason = original(class_name, model_type)
            if module is not None and arrays is not None:
                reason = _not_repeatable(module, arrays, torch.float32)
    except Exception as error:
        module, reason = None, f"{type(error).__name__}: {error}".splitlines()[0][:240]
    row["built"] = module is not None
    if module is None or arrays is None or reason:
        row |= {
            "float32": {"result": "left out", "reason": reason},
            "bfloat16": {"result": "left out", "reason": reason},
        }
    else:
        row["inputs"] = {name: list(value.shape) for name, value in arrays.items()}
        row["parameters"] = sum(p.numel() for p in module.parameters())
        for dtype in DTYPES:
            row[dtype] = _round_trip(module, arrays, dtype, clean, folder)
    return row | {"seconds": round(time.perf_counter() - begin, 2)}


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {CPU_SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _not_repeatable(module: torch.nn.Module, arrays: inputs.Arrays, dtype: torch.dtype) -> str:
    """Why the outputs of this class prove nothing: it fails, or answers differently each time."""
    try:
        once, twice = (facts.outputs(module, arrays, dtype) for _ in range(2))
    except TimeoutError:
        raise
    except Exception as error:
        said = f"the original's forward fails in {dtype}: {type(error).__name__}: {error}"
        return said.splitlines()[0][:240]
    return "forward is not repeatable in one process" if once != twice else ""


def _round_trip(
    module: transformers.PreTrainedModel,
    arrays: inputs.Arrays,
    dtype: str,
    clean: CleanProcess,
    folder: Path,
) -> dict[str, Any]:
    artifact = folder / f"{type(module).__name__}-{dtype}"
    torch_dtype = getattr(torch, dtype)
    try:
        with _time_limit():
            reference = module if dtype == "float32" else cast_reference(module, torch_dtype)
            if reason := _not_repeatable(reference, arrays, torch_dtype):
                return {"result": "left out", "reason": reason}
            before = facts.inventory(module)
            alarm = _save(module, artifact, dtype, arrays)
        np.savez(artifact.with_suffix(".npz"), **cast("dict[str, Any]", arrays))
        clean.ask(artifact, dtype)
        wanted = facts.outputs(reference, arrays, torch_dtype)
        expected = facts.inventory(reference)
        reply = clean.reply()
        result = _compare(expected, wanted, reply)
        if result["result"] == "differs" and dtype == "float32":
            result = _without_gradients(reference, arrays, expected, reply) or result
        result |= alarm | _untouched(before, facts.inventory(module))
        if dtype != "float32":
            result["from_pretrained"] = _as_from_pretrained(
                module, torch_dtype, expected, folder / "checkpoint"
            )
        return result
    except SafeFlavorError as error:
        return {"result": "refused", "error": type(error).__name__, "reason": str(error)}
    except Exception as error:
        return {"result": "differs", "reason": f"{type(error).__name__}: {error}"[:2000]}
    finally:
        shutil.rmtree(artifact, ignore_errors=True)
        artifact.with_suffix(".npz").unlink(missing_ok=True)


def _save(
    module: torch.nn.Module, artifact: Path, dtype: str, arrays: inputs.Arrays
) -> dict[str, str]:
    """Save; a false alarm of the doctor is noted, and overruled."""
    # Recording a graph takes the most of a save: ``graphs.py`` does that.
    arguments: dict[str, Any] = {"task": "raw", "dtype": dtype, "input_example": arrays}
    arguments |= {"rehearse": False, "graph": "no"}
    try:
        mlflow_safeflavor.save_model(module, artifact, **arguments)
    except WeightsError as error:
        mlflow_safeflavor.save_model(module, artifact, on_damage="warn", **arguments)
        return {"alarm": str(error)[:2000]}
    return {}


def _as_from_pretrained(
    module: transformers.PreTrainedModel, dtype: torch.dtype, expected: facts.Facts, folder: Path
) -> str:
    """Whether transformers' own loader gives the reference, too.

    It is a second opinion, and may be wrong itself.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            module.save_pretrained(folder)
            loaded = type(module).from_pretrained(folder, dtype=dtype).eval()
        problems = facts.differences(expected, facts.inventory(loaded))
        return f"{len(problems)} differences: {'; '.join(problems[:3])}" if problems else "equal"
    except TimeoutError:
        raise
    except Exception as error:
        return f"fails: {type(error).__name__}: {error}"[:300]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compare(inventory: facts.Facts, outputs: facts.Facts, reply: dict[str, Any]) -> dict[str, Any]:
    if "error" in reply:
        result = "differs" if reply["error"] == "crash" else "refused"
        return {"result": result, "error": reply["error"], "reason": reply["message"][:2000]}
    problems = [
        *(f"inventory, {text}" for text in facts.differences(inventory, reply["inventory"])),
        *(f"outputs, {text}" for text in facts.differences(outputs, reply["outputs"])),
        *([] if reply["replay"] else ["golden rows are not bit-identical"]),
    ]
    if problems:
        return {
            "result": "differs",
            "reason": f"{len(problems)} differences: " + "; ".join(problems[:6]),
        }
    return {"result": "equal", "tensors": len(inventory), "outputs": len(outputs)}


def _without_gradients(
    reference: torch.nn.Module, arrays: inputs.Arrays, expected: facts.Facts, reply: dict[str, Any]
) -> dict[str, Any] | None:
    """The same comparison, with an original that requires no gradients, like a loaded model.

    Torch multiplies a batch by a weight that requires gradients in another shape (``at::matmul``
    folds it), even in inference mode, and so rounds otherwise.
    """
    flags = {name: parameter.requires_grad for name, parameter in reference.named_parameters()}
    reference.requires_grad_(False)
    wanted = facts.outputs(reference, arrays, torch.float32)
    for name, parameter in reference.named_parameters():
        parameter.requires_grad = flags[name]
    # The golden rows were recorded with gradients, so they are within tolerance, and no more.
    result = _compare(
        expected, wanted, {"replay": True} | reply | ({"replay": True} if "replay" in reply else {})
    )
    return result | {"without_gradients": True} if result["result"] == "equal" else None


def _untouched(before: facts.Facts, after: facts.Facts) -> dict[str, Any]:
    """Saving only looks at the user's module."""
    changed = facts.differences(before, after)
    return (
        {"result": "differs", "reason": "saving changed the original: " + "; ".join(changed[:3])}
        if changed
        else {}
    )


# --- all of them


@contextlib.contextmanager
def sweeping() -> Iterator[tuple[CleanProcess, Path]]:
    """A clean process and a folder on memory.

    Pins are recorded once: they take a second, and no model changes them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    try:
        with (
            mock.patch.object(environment_files, "record", _once(record)),
            # Which is what is found out here; clean.py does the same.
            mock.patch.object(build, "is_proven", return_value=True),
            mock.patch.object(constructor, "is_proven", return_value=True),
            CleanProcess() as clean,
            tempfile.TemporaryDirectory(dir=memory) as folder,
            warnings.catch_warnings(),
        ):
            # what transformers says about odd configs is not what is tested
            warnings.simplefilter("ignore")
            yield clean, Path(folder)
    finally:
        torch.set_num_threads(threads)


def _once(function: Any) -> Any:
    memory: dict[str, Any] = {}

    @functools.wraps(function)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, kwargs))
        if key not in memory:
            memory[key] = function(*args, **kwargs)
        return memory[key]

    return remembered


def sweep(only: str, part: int, parts: int, results: Path) -> None:
    """Check every ``parts``-th class, and write its row as soon as it is known."""
    transformers.logging.set_verbosity_error()
    wanted = [item for item in shrink.architectures().items() if re.search(only, item[0])][
        part::parts
    ]
    with sweeping() as (clean, folder), results.open("w", encoding="utf-8") as file:
        for class_name, model_type in wanted:
            row = check(class_name, model_type, clean, folder)
            print(json.dumps(row), file=file, flush=True)
            print(*(row[dtype]["result"] for dtype in DTYPES), class_name, sep="\t", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression on class names")
    parser.add_argument(
        "--part", default="0/1", help="k/n: every n-th class, beginning with the k-th"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="share the work among so many processes"
    )
    parser.add_argument(
        "--results", type=Path, help="by default results.jsonl, or some.jsonl with --only or --part"
    )
    arguments = parser.parse_args()
    whole = not arguments.only and arguments.part == "0/1"
    arguments.results = arguments.results or TABLES / f"{'results' if whole else 'some'}.jsonl"
    part, parts = map(int, arguments.part.split("/"))
    if arguments.jobs == 1:
        sweep(arguments.only, part, parts, arguments.results)
    else:
        _share(arguments.only, arguments.jobs, arguments.results)
    rows = report.read(arguments.results)
    arguments.results.with_suffix(".md").write_text(report.as_text(rows), encoding="utf-8")
    if parts == 1:
        table = Path(trust.__file__).with_name("proven_classes.txt")
        report.write_proven(table, rows)
    wrong = report.wrong(rows)
    print(
        f"{len(rows)} classes, {len(report.equal(rows))} equal in both dtypes, {len(wrong)} "
        f"wrong: {' '.join(wrong)}"
    )
    return bool(wrong)


def _share(only: str, jobs: int, results: Path) -> None:
    files = [results.with_suffix(f".{job}.jsonl") for job in range(jobs)]
    command = [sys.executable, "-W", "ignore", "-m", "sweep.run", "--only", only]
    workers = [
        subprocess.Popen(
            [*command, "--part", f"{job}/{jobs}", "--results", str(file)], cwd=HERE.parent
        )
        for job, file in enumerate(files)
    ]
    for worker in workers:
        worker.wait()
    rows = sorted(
        (row for file in files for row in report.read(file)), key=lambda row: row["class"]
    )
    results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for file in files:
        file.unlink()
        file.with_suffix(".md").unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
