"""The loaded model: a checked engine and the task that asks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mlflow_safeflavor.artifact.layout import Layout
from mlflow_safeflavor.artifact.spec import ModelSpec
from mlflow_safeflavor.errors import SafeFlavorError
from mlflow_safeflavor.machine import available_cpus
from mlflow_safeflavor.module.failures import named_failure
from mlflow_safeflavor.module.guarded import guarded
from mlflow_safeflavor.predict.answers import answer_rows
from mlflow_safeflavor.predict.deadline import Deadline
from mlflow_safeflavor.predict.deltas import stream_row
from mlflow_safeflavor.predict.progress import Progress, shown
from mlflow_safeflavor.predict.report import LoadReport
from mlflow_safeflavor.predict.scheduler import Scheduler
from mlflow_safeflavor.predict.stream import parquet_chunks, stream
from mlflow_safeflavor.predict.tracing import traced, traced_parts
from mlflow_safeflavor.tasks.engine import Engine
from mlflow_safeflavor.tasks.inputs.caps import Caps
from mlflow_safeflavor.tasks.inputs.columns import without_extra_columns
from mlflow_safeflavor.tasks.inputs.ctc_tokenizer import load_ctc_decoder
from mlflow_safeflavor.tasks.inputs.processor import load_processor
from mlflow_safeflavor.tasks.inputs.text_encoder import TextEncoder
from mlflow_safeflavor.tasks.inputs.tokenizer import load_tokenizer
from mlflow_safeflavor.tasks.table import Task, task_class

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedModel", "make_model", "make_task"]


def make_task(
    spec: ModelSpec,
    layout: Layout,
    hooks: Mapping[str, Callable[..., Any]],
    options: Mapping[str, Any],
) -> Task:
    """The task that a spec names, bound to its recorded config and the run-time options' caps."""
    cls = task_class(spec.task).of(spec.task_config)
    # Tokenizers and processors of transformers are handed over as functions: making one imports
    # transformers, which a graph is served without.
    make: dict[str, Callable[[], Any]] = {
        "encoder": lambda: TextEncoder(
            layout.tokenizer, spec.task_config["encoder"], layout.read_bytes
        ),
        "tokenizer": lambda: cache(lambda: _tokenizer_of(layout)),
        "decoder": lambda: cache(lambda: _decoder_of(spec, layout)),
        "hooks": lambda: hooks,
        "processor": lambda: load_processor(layout.processor, layout.read_json),
        "any_processor": lambda: cache(lambda: _processor_of(layout)),
    }
    # A tokenizer's or processor's JSON may name files and repositories: none is opened.
    with guarded(layout.root):
        task = cls(
            spec.task_config, spec.input_columns, **{name: make[name]() for name in cls.reads}
        )
    task.caps = Caps.of(options)
    return task


def make_model(
    engine: Engine,
    hooks: Mapping[str, Callable[..., Any]],
    spec: ModelSpec,
    layout: Layout,
    options: Mapping[str, Any],
) -> LoadedModel:
    """A loaded model of an engine and the task that the spec names."""
    # Read while they are the files that the manifest was compared with: what is made of them on
    # first use must not be read from a folder that was changed or removed meanwhile.
    layout.keep(layout.tokenizer, layout.processor)
    task = make_task(spec, layout, hooks, options)
    return LoadedModel(spec, task, engine, layout, make_scheduler(task, engine, options), options)


def make_scheduler(task: Task, engine: Engine, options: Mapping[str, Any]) -> Scheduler:
    """The scheduler of an engine, under the run-time options."""
    names = ("max_batch_tokens", "forward_cost", "max_queue", "num_threads")
    # The proof compares a row without padding with the row padded on the right.
    kept = engine.keeps_bits and task.config.get("padding_side") != "left"
    return Scheduler(
        task,
        engine,
        deterministic=options["deterministic"] and not kept,
        # Torch's contexts (devices, autocast) and number of threads are those of a thread.
        anywhere=engine.name != "module",
        # A second forward computes while the first waits for the interpreter, which many callers
        # want: a tenth more requests of 16. A third gains nothing; OpenVINO runs one at a time.
        abreast=min(2, available_cpus()) if engine.name == "onnx" else 1,
        **{name: options[name] for name in names},
    )


def _tokenizer_of(layout: Layout) -> Any:
    """The tokenizer, as transformers makes it; None if none was saved."""
    if not layout.has(layout.tokenizer):
        return None
    with layout.copied(layout.tokenizer) as folder:
        return load_tokenizer(folder)


def _decoder_of(spec: ModelSpec, layout: Layout) -> Any:
    """What a task decodes with: without transformers where the model is one of CTC."""
    if spec.task_config["encoder"].get("ctc"):
        return load_ctc_decoder(layout.tokenizer, layout.read_json)
    return _tokenizer_of(layout)


def _processor_of(layout: Layout) -> Any:
    """The image processor or feature extractor; None if there was none."""
    return (
        load_processor(layout.processor, layout.read_json) if layout.has(layout.processor) else None
    )


@dataclass(frozen=True)
class LoadedModel:
    """A rebuilt, checked and placed model. ``predict`` may be called from many threads.

    Attributes:
        spec: What was saved.
        task: Rows to arrays and back.
        engine: Arrays to arrays.
        files: What its files held when it was loaded.
        scheduler: What runs the engine for many callers.
        options: Run-time options that it was loaded with; see ``options.MODEL_CONFIG``.
        report: What was checked.
        reload: Loads it again, which is how it is pickled; None where nothing was loaded.
    """

    spec: ModelSpec
    task: Task
    engine: Engine
    files: Layout
    scheduler: Scheduler
    options: Mapping[str, Any]
    report: LoadReport = field(default_factory=LoadReport)
    reload: Callable[[], LoadedModel] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.reload is None:
            raise TypeError("a model that is being saved cannot be pickled")
        return self.reload, ()

    @property
    def module(self) -> torch.nn.Module:
        """The transformer itself, rebuilt, checked and placed; on first use where a graph answers.

        Raises:
            StructureError: The artifact holds a graph alone.
        """
        return self.engine.module

    def answered_by(self, engine: Engine) -> LoadedModel:
        """The same model, answered by another engine."""
        return replace(
            self, engine=engine, scheduler=make_scheduler(self.task, engine, self.options)
        )

    @property
    def folder(self) -> Path:
        """Root of the artifact, on which nothing depends any more."""
        return self.files.root

    @cached_property
    def tokenizer(self) -> Any:
        """The transformers tokenizer that was saved; None if there was none. Made on first use."""
        return _tokenizer_of(self.files)

    @cached_property
    def processor(self) -> Any:
        """The image processor or feature extractor that was saved; None if there was none.

        Made on first use.
        """
        return _processor_of(self.files)

    def predict(
        self,
        data: Any,
        params: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
        progress: bool | None = None,
    ) -> Any:
        """Answer rows.

        Args:
            data: A DataFrame, Series, list, dict, string or numpy array; see ``rows.rows_of``. Also
                an iterator of any of these, or the ``pathlib.Path`` of a Parquet file.
            params: Per-request parameters of the task, as declared in the signature.
            timeout: Seconds that the request may take, of a stream each chunk; None for what the
                model was loaded with.
            progress: Whether to show a progress bar; None for on a terminal or in a notebook, when
                it takes longer.

        Returns:
            One row for each row of ``data``, in order, with the columns of the task's signature;
            for the raw task a dict of arrays. For an iterator or a path an iterator, with the
            answers to a chunk at a time.

        Raises:
            InputError: A row, column or parameter cannot be answered; names which.
            OverloadedError: Too many requests wait at the model.
            DeadlineError: The model took longer than ``timeout``.
            AnswerError: The model or a hook raised something of its own, which is the cause.
        """
        timeout = self.options["timeout"] if timeout is None else timeout
        if isinstance(data, Path):
            return self._stream(*parquet_chunks(data), params, timeout, progress)
        if isinstance(data, Iterator):
            return self._stream(data, None, params, timeout, progress)
        with traced(self.spec.task, self.engine.name), shown(progress) as tell:
            return self._predict(data, params, Deadline(timeout), tell)

    def predict_stream(
        self,
        data: Any,
        params: Mapping[str, Any] | None = None,
        *,
        timeout: float | None = None,
    ) -> Iterator[Any]:
        """Answer one row while it is written, for tasks that write text.

        Args:
            data: One row, in any shape that ``predict`` takes.
            params: See ``predict``.
            timeout: Seconds that the whole answer may take; None for what the model was loaded
                with.

        Returns:
            Parts of ``generated_text``, which together are it; of ``llm/v1/…`` OpenAI's chunks.
            Where beams are searched, all comes at the end.

        Raises:
            SafeFlavorError: As ``predict`` does; what no model could answer, at once.
        """
        timeout = self.options["timeout"] if timeout is None else timeout
        parts = stream_row(self.task, self.scheduler, self._known(data), params, timeout)
        return traced_parts(self.spec.task, self.engine.name, parts)

    def _predict(
        self,
        data: Any,
        params: Mapping[str, Any] | None,
        deadline: Deadline,
        tell: Progress | None = None,
    ) -> Any:
        try:
            params = self.task.asked_in(data, params)
            rows = self.task.rows(self._known(data))
            answers = [
                answer
                for answer, _ in answer_rows(
                    self.task, self.scheduler, rows, params, deadline, tell
                )
            ]
            return self.task.result(answers, data)
        except (SafeFlavorError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers panics with what is no Exception
            raise named_failure(error, "encoding or decoding") from error

    def _known(self, data: Any) -> Any:
        """Data of ``predict`` without columns that the run-time options say to ignore."""
        names = [name for name in self.task.columns.values() if name is not None]
        # A column without a name is the only one: of several nothing says which is meant.
        if self.options["extra_columns"] == "ignore" and names:
            return without_extra_columns(data, names)
        return data

    def _stream(
        self,
        chunks: Iterator[Any],
        total: int | None,
        params: Mapping[str, Any] | None,
        timeout: float | None,
        progress: bool | None,
    ) -> Iterator[Any]:
        with shown(progress) as tell:
            answers = stream(
                lambda chunk: self._predict_chunk(chunk, params, timeout), chunks, total, tell
            )
            yield from traced_parts(self.spec.task, self.engine.name, answers)

    def _predict_chunk(
        self, chunk: Any, params: Mapping[str, Any] | None, timeout: float | None
    ) -> Any:
        # A filter before may leave nothing of a chunk, which is no reason to end a long stream.
        if isinstance(chunk, (pd.DataFrame, pd.Series)) and chunk.empty:
            recorded = self.files.read_json(self.files.recorded(self.engine.name)[0])
            return pd.DataFrame(recorded["answers"][:1]).iloc[:0].set_axis(chunk.index)
        return self._predict(chunk, params, Deadline(timeout))
