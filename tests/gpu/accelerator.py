"""The accelerator that checks run on.

The one that torch sees, or one that ``accelerator.cpp`` fakes.

The fake is a device of torch's own kind for devices of others, so that everything that is asked of
the package goes the way it goes on a GPU: tensors have another device, mixing devices is an error,
and memory is counted and can run out.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import torch

__all__ = ["FAKE", "Accelerator", "compiler", "fake", "real"]

FAKE = "fake"
"""The kind of the faked device, as in ``torch.device("fake")``."""

_SOURCE = Path(__file__).with_name("accelerator.cpp")


class Accelerator:
    """What checks ask of a device beside torch.

    Args:
        kind: "cuda", or "fake".
    """

    def __init__(self, kind: str) -> None:
        self.kind, self.device = kind, torch.device(kind, 0)
        self.torch: Any = getattr(torch, kind)

    @property
    def is_fake(self) -> bool:
        """Whether its figures say nothing about GPUs."""
        return self.kind == FAKE

    def wait(self) -> None:
        """Until everything that was asked of it is done."""
        self.torch.synchronize()

    def allocated(self) -> int:
        """Bytes of all tensors on it."""
        return int(self.torch.memory_allocated())

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Most bytes of tensors while inside, beyond those before; appended at the end."""
        found: list[int] = []
        self.torch.empty_cache()
        self.torch.reset_peak_memory_stats()
        before = self.allocated()
        yield found
        found.append(int(self.torch.max_memory_allocated()) - before)

    @contextmanager
    def room(self, more: int) -> Iterator[None]:
        """While inside, only so many more bytes can be had."""
        self.torch.empty_cache()
        _, total = self.torch.mem_get_info()
        held = self.allocated() if self.is_fake else int(self.torch.memory_reserved())
        self.torch.set_per_process_memory_fraction(min(1.0, (held + more) / total))
        try:
            yield
        finally:
            self.torch.set_per_process_memory_fraction(1.0)
            self.torch.empty_cache()


def real() -> Accelerator | None:
    """The GPU that torch sees; None without one."""
    return Accelerator("cuda") if torch.cuda.is_available() else None


def compiler() -> str | None:
    """What can build the fake; None where nothing can."""
    return shutil.which("g++") or shutil.which("clang++")


def fake() -> Accelerator:
    """Build the fake, once for each torch, and make it torch's; for this process for good.

    Raises:
        RuntimeError: There is no compiler, or it fails; says what it said.
    """
    if not hasattr(torch, FAKE):
        library = ctypes.CDLL(os.fspath(_built()), mode=ctypes.RTLD_GLOBAL)
        for name in ("allocated", "peak"):
            getattr(library, f"accelerator_{name}").restype = ctypes.c_int64
        library.accelerator_limit.argtypes = [ctypes.c_int64]
        library.accelerator_start()
        torch.utils.backend_registration.rename_privateuse1_backend(FAKE)
        torch._register_device_module(FAKE, _module(library))
        _let_safetensors_read()
    return Accelerator(FAKE)


_TOTAL = 1 << 34
"""Bytes that the fake says it has."""


def _module(library: ctypes.CDLL) -> ModuleType:
    """``torch.fake``, as far as torch, accelerate and the checks ask ``torch.cuda``."""
    module: Any = ModuleType(f"torch.{FAKE}")
    module.device_count = lambda: 1
    module.is_available = module.is_initialized = lambda: True
    module.current_device = lambda: 0
    module.set_device = module.synchronize = module.empty_cache = module.manual_seed_all = (
        lambda *_: None
    )
    first = os.getpid()
    module._is_in_bad_fork = lambda: os.getpid() != first  # as after CUDA was used
    module.memory_allocated = lambda *_: library.accelerator_allocated()
    module.max_memory_allocated = lambda *_: library.accelerator_peak()
    module.reset_peak_memory_stats = lambda *_: library.accelerator_reset_peak()
    module.mem_get_info = lambda *_: (_TOTAL - library.accelerator_allocated(), _TOTAL)
    module.set_per_process_memory_fraction = lambda part, *_: library.accelerator_limit(
        int(part * _TOTAL)
    )
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


def _let_safetensors_read() -> None:
    """For accelerate, which reads what lies on disk to a device by its name.

    Safetensors has a list of these.
    """
    from accelerate.utils import offload

    original = safetensors.safe_open

    def safe_open(file: Any, *, framework: str, device: Any = "cpu") -> Any:
        return original(
            file, framework=framework, device="cpu" if str(device).startswith(FAKE) else device
        )

    vars(safetensors)["safe_open"] = safe_open
    if hasattr(offload, "safe_open"):
        offload.safe_open = safe_open


def _built() -> Path:
    build = compiler()
    if build is None:
        raise RuntimeError("the fake accelerator needs g++ or clang++")
    what = hashlib.sha256(_SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"safeflavor-accelerator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} is somebody else's")
    library, own = folder / f"{what}.so", folder / f"{what}-{os.getpid()}.so"
    if not library.exists():
        home = Path(torch.__file__).parent
        command = [
            build,
            "-O1",
            "-std=c++20",
            "-shared",
            "-fPIC",
            os.fspath(_SOURCE),
            "-o",
            os.fspath(own),
        ]
        command += [
            f"-I{home}/include",
            f"-I{home}/include/torch/csrc/api/include",
            f"-L{home}/lib",
        ]
        command += [f"-Wl,-rpath,{home}/lib", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the fake accelerator cannot be built: {done.stderr[-2000:]}")
        own.rename(library)
    return library
