"""How many threads this process may use: CPU affinity and the container's quota, not the host's cores."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

__all__ = ["available_cpus", "limit_threads"]

_CGROUP = Path("/sys/fs/cgroup")


def available_cpus(cgroup: Path = _CGROUP) -> int:
    """Cores this process may keep busy: affinity, cut by the cgroup quota (v2 or v1), at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup)
    return max(1, cores if quota is None else min(cores, math.floor(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of CPU time a cgroup grants, or None without a limit."""
    try:
        if (cgroup / "cpu.max").exists():
            limit, period = (cgroup / "cpu.max").read_text().split()
        else:
            limit = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        return None if limit in ("max", "-1") else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def limit_threads(requested: int = 0) -> int:
    """Set torch's threads for this process: as requested, else no more than ``available_cpus``.

    Before torch is imported this sets ``OMP_NUM_THREADS``, which torch reads once, unless the user
    set it; afterwards it calls ``torch.set_num_threads``.

    Returns:
        The number of threads chosen.
    """
    from_user = os.environ.get("OMP_NUM_THREADS", "")
    chosen = requested or (int(from_user) if from_user.isdigit() and int(from_user) else available_cpus())
    torch = sys.modules.get("torch")
    if torch is None:
        os.environ["OMP_NUM_THREADS"] = str(chosen)
    elif torch.get_num_threads() != chosen:
        torch.set_num_threads(chosen)
    return chosen
