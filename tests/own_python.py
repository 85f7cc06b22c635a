"""A Python of its own, for test modules that say ``pytest_plugins = "own_python"``."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlflow_safeflavor.environment.used import Use, find_used


class Site:
    """The site-packages of a Python of its own, which also sees those of this one."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.folder = (
            home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        )
        self.folder.mkdir(parents=True)
        self.python = home / "bin" / "python"
        self.python.parent.mkdir()
        self.python.symlink_to(sys._base_executable)  # type: ignore[attr-defined]
        base = Path(sys._base_executable).parent  # type: ignore[attr-defined]
        (home / "pyvenv.cfg").write_text(f"home = {base}\ninclude-system-site-packages = false\n")
        self.write("theirs.pth", sysconfig.get_path("purelib"))

    def write(self, name: str, text: str = "") -> Path:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def install(
        self,
        name: str,
        version: str = "1.0",
        files: dict[str, str] | None = None,
        requires: Iterable[str] = (),
        *,
        direct_url: Any = None,
        record: bool = True,
    ) -> None:
        """Files and metadata of a distribution.

        ``record`` says whether there is a list of its files.
        """
        info = f"{name.replace('-', '_')}-{version}.dist-info"
        files = {name.replace("-", "_") + "/__init__.py": ""} if files is None else files
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        files = {
            **files,
            f"{info}/METADATA": "\n".join(
                [*lines, *(f"Requires-Dist: {line}" for line in requires)]
            ),
        }
        files[f"{info}/INSTALLER"] = "pip"
        if direct_url:
            files[f"{info}/direct_url.json"] = json.dumps(direct_url)
        for file, text in files.items():
            self.write(file, text)
        if record:
            self.write(f"{info}/RECORD", "".join(f'"{file}",,\n' for file in files))

    @property
    def path(self) -> list[str]:
        return [str(self.folder), sysconfig.get_path("purelib")]

    def used(self, *files: str) -> dict[str, Use]:
        return find_used({"module": {str(self.folder / file): "net" for file in files}}, self.path)


@pytest.fixture
def own_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """An empty ``Site``, whose Python rehearses; this process imports from there, too."""
    path, modules = list(sys.path), set(sys.modules)
    own_site = Site(tmp_path / "python")
    monkeypatch.setattr(sys, "executable", str(own_site.python))
    sys.path.insert(0, str(own_site.folder))
    yield own_site
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith(("acme", "used_")):
            del sys.modules[name]
