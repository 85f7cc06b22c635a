"""The verify story: does a saved model still answer as it did, here or on a server?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from mlflow.types import DataType, Schema

from mlflow_safeflavor.arguments import checked
from mlflow_safeflavor.artifact.json_files import parse_json
from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.plain_files import FETCH_AGAIN
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.environment.recorded import Environment
from mlflow_safeflavor.errors import InputError, IntegrityError, SafeFlavorError
from mlflow_safeflavor.graph.file import reason_against
from mlflow_safeflavor.load.about_process import (
    arrays_asking,
    describe_recorded,
    labelled_row,
    told_environment,
)
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
from mlflow_safeflavor.tasks.raw import Raw
from mlflow_safeflavor.tasks.table import task_class
from mlflow_safeflavor.verify.endpoint import (
    Endpoint,
    as_served,
    request_of_arrays,
    request_of_rows,
)

if TYPE_CHECKING:
    from mlflow_safeflavor.predict.model import LoadedModel

__all__ = ["verify_model"]

# The same rows go together here and there, since the rows of a batch decide how sums are rounded.
_ROWS_PER_REQUEST = 100


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
        device=device, verify=verify, replay=False, trust=frozenset(trust), model_config=chosen
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
            else _verify_server(server, Layout(folder), rows, load, engine)
        )


def _verify_here(model: LoadedModel) -> ParityReport:
    return replace(
        replay(model, model.files),
        environments={"saved": _saved(model.spec, model.files), "here": facts_of(model)},
    )


def _verify_server(
    server: Endpoint,
    layout: Layout,
    rows: pd.DataFrame | str | Path | None,
    load: Callable[[], LoadedModel],
    engine: str | None,
) -> ParityReport:
    # Golden rows that somebody changed prove nothing. The weights are not hashed: nothing of them
    # is used here, and a load hashes them.
    spec = read_saved(layout, weights=False).spec
    stored = run_time_options(stored=spec.model_config, environ={})["engine"]
    usual = "module" if reason_against(layout) else "onnx"
    golden = read_golden(layout, engine or (usual if stored == "auto" else stored))
    # The user's rows first: a mistyped file or column must not wait for a model or a server.
    schema = read_mlmodel(layout.root).get_input_schema()  # type: ignore[no-untyped-call]  # MLflow's
    frame = (
        None
        if rows is None
        else _require_some(rows if isinstance(rows, pd.DataFrame) else _read(rows, schema))
    )
    compared = list(_compare_golden(server, golden, spec, layout))
    environments: dict[str, Any] = {"saved": _saved(spec, layout)}
    if frame is not None:
        model = load()
        compared += _compare_rows(server, model, frame, schema, golden)
        environments["here"] = facts_of(model)
    environments["server"] = _ask_environment(server, golden, spec, layout)
    return ParityReport(tuple(compared), golden.atol, golden.rtol, environments)


# Golden rows


def _compare_golden(
    server: Endpoint, golden: Golden, spec: ModelSpec, layout: Layout
) -> Iterator[Replayed]:
    if not spec.input_columns:
        for index in range(len(golden.rows)):
            wanted = as_served(_raw(spec).result([golden.outputs(index)], None))
            found = server.ask(_request_of_arrays(golden.inputs(index), spec))
            yield from compare_answers(
                [wanted], [found], golden.atol, golden.rtol, golden=True, start=index
            )
        return
    rows, answers = _records(golden, spec, layout)
    # All in one request, as they were recorded: the rows of a batch decide how sums are rounded.
    request, params = (
        request_of_rows(pd.DataFrame(rows, dtype=object)),
        _golden_params(spec, layout),
    )
    request |= {"params": params} if params else {}
    if (cls := task_class(spec.task)).one_answer:
        task = cls(spec.task_config, spec.input_columns)
        wanted, found = [as_served(task.result(answers, None))], [server.ask(request)]
    else:
        # As a frame, since that is what tasks return: it gives each column one type.
        wanted = as_served(pd.DataFrame(answers))
        found = _ask_rows(server, request, len(rows))
    yield from compare_answers(wanted, found, golden.atol, golden.rtol, golden=True)


def _raw(spec: ModelSpec) -> Raw:
    return Raw(spec.task_config, spec.input_columns)


def _request_of_arrays(arrays: Mapping[str, np.ndarray], spec: ModelSpec) -> dict[str, Any]:
    """The request in the form of the model's signature: named arrays, one array, or a table."""
    array = next(iter(arrays.values()))
    form, columns = spec.task_config["form"], spec.task_config["columns"]
    if form == "table":
        return request_of_rows(pd.DataFrame(array, columns=columns))
    return request_of_arrays(array if form == "array" else arrays)


def _golden_params(spec: ModelSpec, layout: Layout) -> dict[str, Any]:
    """Params of the golden rows, as far as the signature declares them."""
    # MLflow drops params that it does not declare, with a warning in the server's log.
    schema = read_mlmodel(layout.root).get_params_schema()  # type: ignore[no-untyped-call]  # MLflow's
    declared = {param.name for param in schema.params} if schema else set()
    return {
        name: value
        for name, value in task_class(spec.task).golden(spec.task_config).items()
        if name in declared
    }


def _records(
    golden: Golden, spec: ModelSpec, layout: Layout
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Golden rows by column name, and their answers."""
    try:
        task = task_class(spec.task)
        names = {field: column or field for field, column in spec.input_columns.items()}
        rows = [{names[field]: task.sent(row[field]) for field in names} for row in golden.rows]
        answers = [dict(answer) for answer in golden.answers]
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            "The golden rows are not rows of this model",
            where=layout.name_of(layout.parity),
            wanted=", ".join(spec.input_columns),
            found=repr(error),
            hint=FETCH_AGAIN,
        ) from None
    return rows, answers


def _ask_rows(server: Endpoint, request: Mapping[str, Any], count: int) -> list[Any]:
    found = server.ask(request)
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


# Rows of the user's


def _compare_rows(
    server: Endpoint, model: LoadedModel, frame: pd.DataFrame, schema: Schema, golden: Golden
) -> Iterator[Replayed]:
    from mlflow.pyfunc.scoring_server import infer_and_parse_data  # takes a second to import

    form = model.spec.task_config.get("form")
    by_column = bool(model.task.columns) or form == "table"
    by_row = by_column and not model.task.one_answer
    size = _ROWS_PER_REQUEST if by_column else 1
    for start in range(0, len(frame), size):
        part = frame.iloc[start : start + size]
        row = part.iloc[0].to_dict()
        arrays = next(iter(row.values())) if form == "array" else row
        request = request_of_rows(part) if by_column else request_of_arrays(arrays)
        # Read by MLflow's own parser, so that both sides see the same values in the same types.
        wanted = as_served(model.predict(infer_and_parse_data(request, schema)))
        found = _ask_rows(server, request, len(part)) if by_row else [server.ask(request)]
        yield from compare_answers(
            wanted if by_row else [wanted],
            found,
            golden.atol,
            golden.rtol,
            golden=False,
            start=start,
        )


def _require_some(frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        raise InputError(
            "There are no rows to compare", where="rows", wanted="at least one row", found="none"
        )
    return frame


def _read(path: str | Path, schema: Schema) -> pd.DataFrame:
    """Rows of a file, by its ending."""
    # Columns that the model takes as texts stay texts: pandas makes 7 of "007" and nan of "NA".
    # A column without a name is any column of the file, so all are read as texts.
    texts = [spec.name for spec in schema.inputs if spec.type == DataType.string]
    readers: dict[str, Callable[[], pd.DataFrame]] = {
        ".csv": lambda: pd.read_csv(
            path,
            dtype=str if texts == [None] else dict.fromkeys(texts, str),
            keep_default_na=len(texts) < len(schema.inputs),
        ),
        ".json": lambda: _read_json(path, lines=False),
        ".jsonl": lambda: _read_json(path, lines=True),
        ".ndjson": lambda: _read_json(path, lines=True),
        ".parquet": lambda: pd.read_parquet(path),
    }
    ending = Path(path).suffix.lower()
    if ending not in readers:
        raise InputError(
            "Rows cannot be read from this file",
            where=path,
            wanted=" | ".join(readers),
            found=ending,
        )
    try:
        return readers[ending]()
    # All these are raised by pandas and pyarrow over files that are not of the kind.
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            "Rows cannot be read from this file", where=path, wanted=ending[1:], found=error
        ) from None


def _read_json(path: str | Path, *, lines: bool) -> pd.DataFrame:
    """Records of a JSON file, with values as they stand there."""
    # Not pandas' read_json, which makes dates and numbers of texts that look like them.
    text = Path(path).read_text(encoding="utf-8-sig")
    # Not splitlines, which also cuts at line separators within texts.
    parts = [line for line in text.split("\n") if line.strip()] if lines else [text]
    read = [parse_json(part, strict=False) for part in parts]
    records = read if lines else read[0]
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("not a list of objects")
    return pd.DataFrame(records)


# Environments


def _saved(spec: ModelSpec, layout: Layout) -> dict[str, Any]:
    return describe_recorded(
        Environment.from_json(layout.read_json(layout.environment)), spec.loader_version
    )


def _ask_environment(
    server: Endpoint, golden: Golden, spec: ModelSpec, layout: Layout
) -> dict[str, Any] | None:
    """Facts that the server tells of itself; None where it tells none."""
    if spec.input_columns:
        row = _records(golden, spec, layout)[0][0]
        request: dict[str, Any] | None = labelled_row(list(row), list(row.values()))
    else:
        arrays = arrays_asking(
            {name: np.asarray(value) for name, value in golden.inputs(0).items()}
        )
        request = None if arrays is None else _request_of_arrays(arrays, spec)
    try:
        return told_environment(server.ask(request)) if request else None
    # An older server, or one that refuses a row with a label: the comparison needs no facts.
    except SafeFlavorError:
        return None
