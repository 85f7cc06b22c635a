"""The arguments of a load, as one value."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlflow_safeflavor.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["LoadOptions"]

_VERIFY = ("full", "rehash", "structure", "off")


@dataclass(frozen=True)
class LoadOptions:
    """Arguments of ``load_model``; the load story hands on their values.

    Attributes:
        model_config: Run-time options that the caller sets, below the environment's.
        chosen: Every run-time option, where they were needed before the model was looked at.
        replay: Whether the story answers the golden rows; ``verify_model`` does so itself.
    """

    device: str | int | torch.device = "auto"
    dtype: str | torch.dtype | None = None
    device_map: str | Mapping[str, Any] | None = None
    verify: str = "full"
    environment: str = "warn"
    trust: Collection[str] = field(default_factory=frozenset)
    model_config: Mapping[str, Any] = field(default_factory=dict)
    chosen: Mapping[str, Any] | None = None
    replay: bool = True

    def __post_init__(self) -> None:
        if self.verify not in _VERIFY:
            raise InputError(
                "Unknown value", where="verify", wanted=" | ".join(_VERIFY), found=repr(self.verify)
            )

    @property
    def hashes(self) -> bool:
        """Whether the bytes of all files are compared with the recorded digests."""
        return self.verify in ("full", "rehash")

    @property
    def rehashes(self) -> bool:
        """Whether nothing counts that this host remembers of files it has hashed before."""
        return self.verify == "rehash"

    @property
    def believes(self) -> bool:
        """Whether the outcome of a replay by another process of this host counts."""
        # As long as files and environment are the same for sure.
        return self.hashes and not self.rehashes and self.environment != "ignore"

    @property
    def place(self) -> dict[str, Any]:
        """Where the weights go and in which dtype; ``load_model`` says what each takes."""
        return {"device": self.device, "dtype": self.dtype, "device_map": self.device_map}

    @property
    def replays(self) -> bool:
        """Whether the golden rows are answered again."""
        return self.replay and self.verify != "off"
