"""Runs checks one after the other and tells of each on standard output, one line of JSON.

``gpu_check.py`` watches it.

python -m gpu.worker real|fake FOLDER NAME…
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import accelerator, arithmetic, placing, processes, room, serving  # noqa: F401  (they list themselves)
from .bench import CHECKS, Bench, Check, NeedsGPU
from .models import Saved

__all__ = ["describe", "run_check"]


def run_check(check: Check, bench: Bench) -> dict[str, Any]:
    """Verdict ("ok", "FAIL" or "needs a GPU"), seconds, and figures or what was said."""
    begun = time.perf_counter()
    verdict: dict[str, Any]
    try:
        verdict = {"verdict": "ok", "figures": dict(check.run(bench))}
    except NeedsGPU:
        verdict = {"verdict": "needs a GPU"}
    except BaseException as error:
        trace = "".join(traceback.format_exception(error)[-6:])
        verdict = {"verdict": "FAIL", "said": f"{type(error).__name__}: {error}", "trace": trace}
    gc.collect()
    return {"check": check.name, "seconds": round(time.perf_counter() - begun, 2), **verdict}


def describe(device: accelerator.Accelerator) -> dict[str, Any]:
    """What the figures depend on."""
    names = (
        "torch",
        "transformers",
        "accelerate",
        "tokenizers",
        "safetensors",
        "mlflow-skinny",
        "mlflow-safeflavor",
    )
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }
    facts |= {name: version(name) for name in names}
    if device.is_fake:
        return {"device": "faked", **facts}
    card = torch.cuda.get_device_properties(0)
    facts |= {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory": card.total_memory,
    }
    driver = Path("/proc/driver/nvidia/version")
    facts["driver"] = driver.read_text().splitlines()[0] if driver.exists() else "not told"
    return {
        "device": "cuda",
        **facts,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def main(kind: str, folder: str, names: list[str]) -> int:
    """Run checks by name; returns an exit status."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print is not what the watcher reads
    warnings.simplefilter("ignore")

    def tell(**line: Any) -> None:
        out.write(json.dumps(line, default=str) + "\n")

    try:
        device = accelerator.real() if kind == "real" else accelerator.fake()
    except RuntimeError as error:
        tell(refused=str(error))
        return 2
    if device is None:
        tell(
            refused=f"torch {torch.__version__} sees no GPU; --fake runs the same checks on a "
            "faked one"
        )
        return 2
    tell(facts=describe(device), checks=names or list(CHECKS))
    saved = Saved(Path(folder))
    for check in [CHECKS[name] for name in names or CHECKS]:
        tell(begins=check.name, limit=check.limit)
        with tempfile.TemporaryDirectory() as work:
            tell(**run_check(check, Bench(device, saved, Path(work))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
