"""The verify story: does a saved model still answer as it did, here or on a server?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import InputError, SafeFlavorError
from mlflow_safeflavor.graph.file import reason_against
from mlflow_safeflavor.load.about_process import recorded_facts, told_environment
from mlflow_safeflavor.load.download import located
from mlflow_safeflavor.load.load import keep_if_needed, load_folder
from mlflow_safeflavor.load.options import LoadOptions
from mlflow_safeflavor.load.pyfunc import facts_of
from mlflow_safeflavor.load.saved import read_saved
from mlflow_safeflavor.mlflow_compat import read_mlmodel
from mlflow_safeflavor.predict.comparison import compare_answers
from mlflow_safeflavor.predict.golden import Golden, read_golden
from mlflow_safeflavor.predict.options import run_time_options
from mlflow_safeflavor.predict.parity import ParityReport, Replayed
from mlflow_safeflavor.predict.replay import replay
from mlflow_safeflavor.verify.endpoint import Endpoint
from mlflow_safeflavor.verify.questions import Question, about_environment, of_golden, of_rows
from mlflow_safeflavor.verify.user_rows import read_rows

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["verify_model"]


@checked
def verify_model(
    model_uri: str | Path,
    *,
    endpoint: str | None = None,
    rows: pd.DataFrame | str | Path | None = None,
    device: str = "auto",
    engine: str | None = None,
    trust: Collection[str] = (),
    rehash: bool = False,
    timeout: float = 60.0,
) -> ParityReport:
    """Answer the golden rows again, here or on a server, and compare with the recorded answers.

    Without ``endpoint`` the model is loaded here, with every check but the last. With it the model
    is loaded only where ``rows`` are given, whose answers were not recorded.

    Args:
        model_uri: See ``load_model``.
        endpoint: Address of a running MLflow scoring server, such as ``http://127.0.0.1:5000``.
        rows: Rows of yours, by the model's column names, to be answered here and there: a
            DataFrame, or a file of JSON records, JSON lines, CSV or Parquet. For a model of named
            arrays each row is one request, and each cell an array or nested lists.
        device: Where to load the model here; see ``load_model``.
        engine: Engine that answers here: "onnx", "openvino" or "module"; by default the one that a
            server would choose.
        trust: See ``load_model``.
        rehash: Hash all weights that are loaded here, also those that this host has hashed before.
        timeout: Seconds that all requests to the server may take together; loading a model here is
            not counted.

    Returns:
        The comparison, whether it is good or bad.

    Raises:
        InputError: ``rows`` without an endpoint, rows that no model could answer, or an address
            that is none.
        SafeFlavorError: The model cannot be loaded, or the server cannot be asked.
    """
    chosen = {"engine": engine} if engine else {}
    verify = "rehash" if rehash else "full"
    # replay=False: a load that raises at the first difference could not report all of them.
    options = LoadOptions(
        device=device,
        verify=verify,
        trust=frozenset(trust),
        model_config=chosen,
        replay=False,
    )
    if endpoint is None and rows is not None:
        raise InputError(
            "There is nothing to compare your rows with",
            where="rows",
            wanted="the address of a server, too",
            hint="pass endpoint=… (--endpoint URL), or leave the rows out",
        )
    server = None if endpoint is None else Endpoint(endpoint, timeout)
    with ExitStack() as download:
        folder = download.enter_context(located(model_uri))

        def load() -> LoadedModel:
            model = load_folder(folder, options)
            keep_if_needed(download, model)
            return model

        return (
            _verify_here(load())
            if server is None
            else _verify_server(server, folder, rows, load, engine)
        )


def _verify_here(model: LoadedModel) -> ParityReport:
    golden = read_golden(model.files, model.engine.name)
    environments = {"saved": _recorded(model.files, model.spec), "here": facts_of(model)}
    return replace(replay(model, golden), environments=environments)


def _verify_server(
    server: Endpoint,
    folder: Path,
    rows: pd.DataFrame | str | Path | None,
    load: Callable[[], LoadedModel],
    engine: str | None,
) -> ParityReport:
    # Golden rows that somebody changed prove nothing. The weights are not hashed: nothing of them
    # is used here, and a load hashes them.
    saved = read_saved(folder, weights=False)
    stored = run_time_options({}, saved.spec.model_config)["engine"]
    usual = "module" if reason_against(saved.layout) else "onnx"
    golden = read_golden(saved.layout, engine or (usual if stored == "auto" else stored))
    # The user's rows first: a mistyped file or column must not wait for a model or a server.
    mlmodel: Any = read_mlmodel(folder)
    schema, params = mlmodel.get_input_schema(), mlmodel.get_params_schema()
    frame = None if rows is None else read_rows(rows, schema)
    declared = [param.name for param in params.params] if params else []
    compared = list(
        _compared(server, of_golden(golden, saved.spec, declared), golden, are_golden=True)
    )
    environments: dict[str, Any] = {"saved": _recorded(saved.layout, saved.spec)}
    if frame is not None:
        model = load()
        compared += _compared(server, of_rows(model, frame, schema), golden, are_golden=False)
        environments["here"] = facts_of(model)
    environments["server"] = _told(server, about_environment(golden, saved.spec))
    return ParityReport(tuple(compared), golden.atol, golden.rtol, environments)


def _compared(
    server: Endpoint, questions: Iterable[Question], golden: Golden, *, are_golden: bool
) -> Iterator[Replayed]:
    """Ask a server, and compare what it answers within the tolerance of the golden rows."""
    for question in questions:
        found = question.lasting(server.ask(question.request))
        yield from compare_answers(
            question.wanted,
            _by_row(server, found, len(question.wanted)) if question.by_row else [found],
            golden.atol,
            golden.rtol,
            golden=are_golden,
            start=question.start,
        )


def _by_row(server: Endpoint, found: Any, count: int) -> list[Any]:
    # Another model behind the address, or one that leaves out or adds rows.
    if not isinstance(found, list) or len(found) != count:
        raise SafeFlavorError(
            "The server does not answer row by row",
            where=server,
            wanted=f"{count} predictions",
            found=f"{len(found)} predictions"
            if isinstance(found, list)
            else f"a {type(found).__name__}",
            hint="see that it serves this very model",
        )
    return found


def _recorded(layout: Layout, spec: ModelSpec) -> dict[str, Any]:
    """What the model was saved with."""
    return recorded_facts(Environment.read(layout), spec.loader_version)


def _told(server: Endpoint, request: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Facts that the server tells of itself; None where it does not, for whatever reason."""
    try:
        return told_environment(server.ask(request)) if request else None
    # An older server, or one that refuses a row with a label: the comparison needs no facts.
    except SafeFlavorError:
        return None
