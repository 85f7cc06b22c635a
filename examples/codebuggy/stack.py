"""The whole of CodeBuggy on this machine.

PostgreSQL, S3, MLflow, the model and the app, as containers or processes.

    python stack.py up            # containers: docker compose
    python stack.py up --local    # processes on loopback; nothing is pulled
    python stack.py down          # stops either, also what a crash left

``up`` trains and registers a model where there is no champion yet, waits until everything is
healthy, asks one question and prints the answer. ``make stack``, ``make stack LOCAL=1`` and ``make
stack-down`` are the same.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from background import Background, NotReadyError, wait_until
from parts import LocalParts, MissingPartError, stop_everything
from rich.console import Console
from servers import TRUST, free_port

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent.parent / ".stack"
MODEL = "codebuggy"
CHAMPION = f"models:/{MODEL}@champion"
QUESTION = {
    "buggy_code": "def last(items):\n    return items[len(items)]\n",
    "fixed_code": "def last(items):\n    return items[len(items) - 1]\n",
}
_STARTING = 300.0
"""Seconds that the model and the app may take to start."""

console = Console(stderr=True)


@contextmanager
def step(text: str) -> Iterator[None]:
    """Show that something is going on, and afterwards how long it took."""
    started = time.monotonic()
    if not console.is_terminal:
        console.print(f"{text} …")
    with console.status(f"{text} …"):
        yield
    console.print(f"[green]✓[/] {text} [dim]({time.monotonic() - started:.1f} s)[/]")


def fetch(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """GET, or POST of JSON; the answer's JSON."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read().decode()
    return json.loads(text) if text.strip().startswith(("{", "[")) else text


def answers(url: str) -> bool:
    """Whether a GET succeeds."""
    try:
        fetch(url)
    except OSError:
        return False
    return True


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """Variables for processes of the stack, with this interpreter's programs on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", **more}


def run(command: list[Any], environ: Mapping[str, str]) -> None:
    """Run a command whose output the user sees, all of it on stderr.

    Raises:
        NotReadyError: Its exit status is not 0.
    """
    words = [str(word) for word in command]
    if subprocess.run(words, env=dict(environ), stdout=2).returncode:
        raise NotReadyError(f"this failed: {' '.join(words)}")


def require_champion(tracking_uri: str, training: list[str]) -> None:
    """Train and register a model where the registry has no champion yet.

    Args:
        tracking_uri: Of a running server. Artifacts go through it, so its S3 server need not be
            reachable from here.
        training: More arguments for ``train.py``.
    """
    # By default the server hands out addresses at its S3 server, which may be one that only it can
    # reach.
    environ = environment(
        {"MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false"}
    )
    if answers(
        f"{tracking_uri}/api/2.0/mlflow/registered-models/alias?name={MODEL}&alias=champion"
    ):
        console.print(f"[green]✓[/] {CHAMPION} is there")
        return
    with step("Training a model and registering it"):
        command = [sys.executable, HERE / "train.py", "--tracking-uri", tracking_uri]
        run([*command, "--registered-model-name", MODEL, *training], environ)


# As processes


def start_locally(folder: Path, port: int, training: list[str]) -> str:
    """Start everything as processes that stay; gives the address of the app.

    All addresses are in ``stack.json``.
    """
    with step("Starting PostgreSQL, SeaweedFS and MLflow"):
        parts = LocalParts(folder, survive=True)
        parts.start()
    require_champion(parts.tracking_uri, training)
    urls = {"mlflow": parts.tracking_uri, "s3": parts.s3_url}
    with step(f"Serving {CHAMPION}"):
        urls["model"] = serve_model(Background("model", folder), parts.tracking_uri)
    with step("Starting the app"):
        urls["app"] = serve_app(Background("app", folder), urls["model"], port)
    (folder / "stack.json").write_text(json.dumps(urls), encoding="utf-8")
    console.print(
        "   ".join(f"{name}: {url}" for name, url in urls.items()),
        f"  logs: {folder}",
        soft_wrap=True,
    )
    return urls["app"]


def serve_model(process: Background, tracking_uri: str) -> str:
    """Start ``mlflow models serve`` of the champion, in place of one that runs.

    Gives its address.
    """
    process.stop()
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local"]
    command += ["--model-uri", CHAMPION, "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    process.start(command, environment({**TRUST, "MLFLOW_TRACKING_URI": tracking_uri}))
    wait_until(lambda: answers(f"{url}/ping"), process, _STARTING)
    return url


def serve_app(process: Background, model_url: str, port: int) -> str:
    """Start the app before a model that is served, in place of one that runs; gives its address."""
    process.stop()
    url = f"http://127.0.0.1:{port or free_port()}"
    command: list[str | Path] = [
        sys.executable,
        HERE / "serve.py",
        "--endpoint",
        model_url,
        "--port",
        url.rpartition(":")[2],
    ]
    process.start(command, environment({}))
    wait_until(lambda: answers(f"{url}/health"), process, _STARTING)
    return url


# As containers


def start_containers(folder: Path, port: int, training: list[str]) -> str:
    """Start everything with docker compose; gives the address of the app."""
    environ = environment({**container_settings(folder), "APP_PORT": str(port or free_port())})
    with step("Starting PostgreSQL, SeaweedFS and MLflow"):
        run([*compose(), "up", "--detach", "--wait", "postgres", "s3", "mlflow"], environ)
    tracking_uri = f"http://127.0.0.1:{environ['MLFLOW_PORT']}"
    require_champion(tracking_uri, training)
    image = Path(environ["MODEL_IMAGE"])
    with step("Writing the model's image, and building and starting it with the app"):
        shutil.rmtree(image, ignore_errors=True)
        client = {
            "MLFLOW_TRACKING_URI": tracking_uri,
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
        }
        run(
            ["mlflow-safeflavor", "dockerfile", CHAMPION, "-o", image, "--allow-pickle"],
            {**environ, **client},
        )
        run([*compose(), "up", "--detach", "--wait", "--build", "model", "app"], environ)
    return f"http://127.0.0.1:{environ['APP_PORT']}"


def compose() -> list[str]:
    """The words that start docker compose; version 1, ``docker-compose``, cannot wait.

    Raises:
        MissingPartError: There is none.
    """
    words = ["docker", "compose"]
    if (
        shutil.which("docker") is None
        or subprocess.run([*words, "version"], capture_output=True).returncode
    ):
        raise MissingPartError("docker compose is not installed")
    return [*words, "--file", str(HERE / "compose.yaml")]


def container_settings(folder: Path) -> dict[str, str]:
    """Variables of the compose file: passwords and ports, made at the first start and kept."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "containers.json"
    if not file.exists():
        words = ("POSTGRES_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        content = {name: secrets.token_hex(16) for name in words}
        content |= {"MLFLOW_PORT": str(free_port()), "MODEL_IMAGE": str(folder / "image")}
        file.touch(mode=0o600)
        file.write_text(json.dumps(content), encoding="utf-8")
    content = json.loads(file.read_text(encoding="utf-8"))
    return {**content, "MLFLOW_VERSION": importlib.metadata.version("mlflow")}


# The commands


@click.group()
@click.option(
    "--folder", type=click.Path(path_type=Path), default=FOLDER, help="Data, logs and pid files."
)
@click.pass_context
def main(context: click.Context, folder: Path) -> None:
    """CodeBuggy with all its parts on this machine."""
    context.obj = folder.absolute()


@main.command(context_settings={"ignore_unknown_options": True})
@click.option("--local", is_flag=True, help="As processes on loopback instead of containers.")
@click.option("--port", default=8080, show_default=True, help="Of the app; 0 for any that is free.")
@click.argument("training", nargs=-1)
@click.pass_obj
def up(folder: Path, local: bool, port: int, training: tuple[str, ...]) -> None:
    """Start everything, ask one question, print the answer. Arguments after -- go to train.py."""
    try:
        url = (start_locally if local else start_containers)(folder, port, list(training))
        answer = fetch(f"{url}/predict", QUESTION)
    except (MissingPartError, NotReadyError, OSError) as error:
        console.print(str(error), style="red", markup=False)
        if not local:
            console.print(
                "Where images cannot be pulled, or there is no engine: make stack LOCAL=1",
                markup=False,
            )
        console.print("What runs already goes on; `make stack-down` stops it.", markup=False)
        sys.exit(1)
    console.print(f"Asked {url}/predict about a pair of snippets; it answers:", markup=False)
    print(json.dumps(answer))


@main.command()
@click.pass_obj
def down(folder: Path) -> None:
    """Stop everything that ``up`` started, also after a crash.

    Data stay in the folder, and in Docker's volumes.
    """
    stopped = stop_everything(folder)
    if (folder / "containers.json").exists():
        try:
            run([*compose(), "down"], environment(container_settings(folder)))
            stopped.append("containers")
        except (MissingPartError, NotReadyError) as error:
            console.print(str(error), style="red", markup=False)
            sys.exit(1)
    console.print(f"stopped: {', '.join(stopped) or 'nothing, as nothing ran'}")


if __name__ == "__main__":
    main()
