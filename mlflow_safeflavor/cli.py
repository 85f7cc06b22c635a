"""``mlflow-safeflavor``: look at a saved model, and prove that it still answers as it did."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlflow_safeflavor.errors import InputError, SafeFlavorError, plain
from mlflow_safeflavor.load.download import located
from mlflow_safeflavor.load.saved import read_saved
from mlflow_safeflavor.verify.inspection import say, show
from mlflow_safeflavor.version import __version__

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.parity import ParityReport

__all__ = ["main"]

_MOST_SHOWN = 20  # rows with a problem; the page of --report has more


class _Errors(click.Group):
    """Says errors, ours and MLflow's, on stderr and exits with status 2, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        # Ours are of this kind, too, and were made plain where they were raised; MLflow's quote
        # servers and artifacts as they are.
        except MlflowException as error:
            message = error.message if isinstance(error, SafeFlavorError) else plain(error.message)
            say(Console(stderr=True), f"{type(error).__name__}: {message}", style="red")
            ctx.exit(2)


@click.group(cls=_Errors)
@click.version_option(__version__)
def main() -> None:
    """Models that answer the same everywhere, or say why not."""


@main.command()
@click.argument("uri")
@click.option("--pins", is_flag=True, help="List every pinned distribution.")
@click.option("--tensors", "rows", is_flag=True, help="List every tensor.")
@click.option("--graph", "calls", is_flag=True, help="Print the recorded graph, a node a line.")
def inspect(uri: str, pins: bool, rows: bool, calls: bool) -> None:
    """Show facts of the model at URI. Nothing of the artifact is run, built or imported."""
    # Not even weights are hashed: that is verify's, and takes a second for each gigabyte.
    with located(uri) as folder:
        show(Console(), uri, read_saved(folder, weights=False), pins=pins, rows=rows, calls=calls)


@main.command()
@click.argument("uri")
@click.option(
    "--endpoint",
    metavar="URL",
    help="Ask this running MLflow server, and load nothing for the golden rows.",
)
@click.option(
    "--rows",
    type=click.Path(exists=True, dir_okay=False),
    help="Rows of yours for the server and the model loaded here: .json (records), .jsonl, .csv "
    "or .parquet.",
)
@click.option("--report", "page", type=click.Path(dir_okay=False), help="Write an HTML page.")
@click.option("--device", default="auto", show_default=True, help="Where to load the model here.")
@click.option(
    "--engine",
    type=click.Choice(["onnx", "openvino", "module"]),
    help="Engine that answers here; by default the one that serves.",
)
@click.option(
    "--trust",
    multiple=True,
    metavar="KIND",
    help="Let the model's own code or pickle run here; repeatable.",
)
@click.option(
    "--rehash", is_flag=True, help="Hash all weights, also those that this host has hashed before."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds that all requests to the server may take together.",
)
def verify(
    uri: str,
    endpoint: str | None,
    rows: str | None,
    page: str | None,
    device: str,
    engine: str | None,
    trust: tuple[str, ...],
    rehash: bool,
    timeout: float,
) -> None:
    """Replay the golden rows of the model at URI, loaded here or behind a running server.

    Exit status: 0 if all answers are equal or within tolerance, 1 if any is different, 2 for an
    error.
    """
    from mlflow_safeflavor.verify.verify import verify_model

    console = Console()
    with Console(stderr=True).status("asking the server" if endpoint else f"loading {uri}"):
        report = verify_model(
            uri,
            endpoint=endpoint,
            rows=rows,
            device=device,
            engine=engine,
            trust=trust,
            rehash=rehash,
            timeout=timeout,
        )
    console.print(_golden_table(report, uri))
    console.print(f"tolerance: atol {report.atol:g}, rtol {report.rtol:g}")
    if endpoint:
        _print_comparison(report, console)
    if page:
        _write_page(page, report, uri, endpoint)
    # For scripts: 1 is a difference, 2 (see _Errors) is that nothing could be compared.
    sys.exit(0 if report.ok else 1)


def _golden_table(report: ParityReport, title: str) -> Table:
    table = Table(
        "golden row",
        "largest difference",
        "verdict",
        title=Text(plain(title)),
        title_justify="left",
    )
    for row in report.rows:
        if row.golden:
            # A server's words, and so no markup.
            verdict = Text(plain(row.problem or row.verdict))
            table.add_row(
                str(row.row),
                f"{row.max_difference:.3g}",
                verdict,
                style="red" if row.problem else None,
            )
    return table


def _print_comparison(report: ParityReport, console: Console) -> None:
    """Print a server's side; its words may be a stranger's, so none is taken for markup."""
    own = [row for row in report.rows if not row.golden]
    if own:
        counts = Counter(row.verdict for row in own)
        listed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        console.print(f"{len(own)} rows of yours: {listed}")
    for row in [row for row in own if row.problem][:_MOST_SHOWN]:
        say(console, plain(row.problem), style="red")
    console.print(f"verdict: {report.verdict}", style=None if report.ok else "red")
    if report.first_difference:
        say(console, f"first difference: {plain(report.first_difference)}")
    if report.environments["server"] is None:
        console.print(
            "the server does not tell its environment: see MLFLOW_SAFEFLAVOR_TELL_ENVIRONMENT"
        )


def _write_page(path: str, report: ParityReport, uri: str, endpoint: str | None) -> None:
    from mlflow_safeflavor.verify.endpoint import Endpoint
    from mlflow_safeflavor.verify.page import render

    # As text the address has no password: the page may be sent to others.
    server = str(Endpoint(endpoint)) if endpoint else None
    try:
        Path(path).write_text(
            # A row may hold half a surrogate pair, which UTF-8 cannot encode.
            render(report, model=uri, endpoint=server),
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise InputError("The page cannot be written", where=path, found=error.strerror) from None


@main.command()
@click.argument("uri")
@click.option(
    "-o", "--output", "folder", required=True, type=click.Path(), help="Folder to create."
)
@click.option(
    "--target",
    default="cpu",
    show_default=True,
    help="cpu refuses pins that install CUDA; cuda keeps them.",
)
@click.option(
    "--user", default="mlflow", show_default=True, help="Name of the user, not root, that serves."
)
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    help="onnx installs what the graph needs, module all; auto: onnx where it serves.",
)
@click.option("--base-image", help="Instead of python:X.Y.Z-slim.")
@click.option(
    "--hashes/--no-hashes", default=True, show_default=True, help="Lock the pins with hashes."
)
@click.option(
    "--allow-pickle", is_flag=True, help="The image may run the pickle that the model holds."
)
def dockerfile(
    uri: str,
    folder: str,
    target: str,
    user: str,
    engine: str,
    base_image: str | None,
    hashes: bool,
    allow_pickle: bool,
) -> None:
    """Write a folder from which `docker build` makes an image that serves the model at URI."""
    from mlflow_safeflavor.load.image import generate_dockerfile

    with Console(stderr=True).status("looking up the hashes of all pins" if hashes else "copying"):
        path = generate_dockerfile(
            uri,
            folder,
            target=target,
            user=user,
            engine=engine,
            base_image=base_image,
            hashes=hashes,
            trust={"pickle"} if allow_pickle else (),
        )
    say(Console(), f"wrote {path}\nnow: docker build -t NAME {path.parent}")


@main.command()
@click.argument("model_id")
@click.option(
    "--revision", metavar="COMMIT", help="Commit of the repository, 40 hexadecimal digits."
)
@click.option(
    "-o", "--output", "folder", required=True, type=click.Path(), help="Folder to create."
)
@click.option(
    "--resolve", is_flag=True, help="Take also a branch or tag, and record which commit it is now."
)
@click.option(
    "--convert",
    is_flag=True,
    help="Store pickled weights as safetensors where there are no others.",
)
@click.option(
    "--model-class", metavar="NAME", help="Class of transformers to load it as, for the check."
)
@click.option("--dtype", default="float32", show_default=True, help="To load it in, for the check.")
@click.option(
    "--new",
    multiple=True,
    metavar="PATTERN",
    help="Tensors that the checkpoint may lack; repeatable.",
)
@click.option(
    "--drop",
    multiple=True,
    metavar="PATTERN",
    help="Keys of the checkpoint to leave out; repeatable.",
)
def prefetch(model_id: str, folder: str, **options: Any) -> None:
    """Download weights, config and tokenizer of MODEL_ID, and load them once.

    MODEL_ID is a hub repository or a local folder. For build stages: the folder appears when all of
    it is there and right. A second run only checks it.
    """
    # Here and not above: it brings torch, which no other command needs before it loads a model.
    from mlflow_safeflavor.checkpoints.prefetch import prefetch

    with Console(stderr=True).status(f"fetching {model_id}"):
        done = prefetch(model_id, folder, **options)
    what = f"{done.source} at {done.revision}" if done.source else model_id
    verb = "wrote" if done.fresh else "already there, and as it was written:"
    say(Console(), f"{verb} {done.folder}: {len(done.files)} files of {what}")
