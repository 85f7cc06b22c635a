"""Streams: tables too long to hold, chunk by chunk, the next encoded while the model runs one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pandas as pd

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.predict.progress import Progress

__all__ = ["parquet_chunks", "stream"]

# Rows of a Parquet file at a time.
_CHUNK = 1024
# Chunks at the model. The second one fills the batches that the first leaves half empty; more
# would only be held.
_IN_FLIGHT = 2


def stream(
    predict: Callable[[Any], Any], chunks: Iterable[Any], total: int | None, tell: Progress | None
) -> Iterator[Any]:
    """Answers of each chunk, in order, as soon as they are there.

    Args:
        predict: Answers one chunk; called from two threads.
        chunks: What ``predict`` takes; read no further ahead than it is answered.
        total: Rows of all chunks; None if unknown.
        tell: Told the number of rows answered so far, and ``total``.
    """
    pool, waiting, done = (
        ThreadPoolExecutor(_IN_FLIGHT, "safeflavor-stream"),
        deque[Future[Any]](),
        0,
    )
    try:
        for chunk in _then_none(chunks):
            if chunk is not None:
                # With the caller's span, which is a variable of the context.
                waiting.append(pool.submit(copy_context().run, predict, chunk))
            while waiting and (chunk is None or len(waiting) == _IN_FLIGHT):
                answers = waiting.popleft().result()
                done += len(answers) if isinstance(answers, pd.DataFrame) else 1
                if tell is not None:
                    tell(done, total)
                yield answers
    finally:
        # A caller that stops iterating waits for the chunks that run, and for no others.
        pool.shutdown(cancel_futures=True)


def _then_none(chunks: Iterable[Any]) -> Iterator[Any]:
    yield from chunks
    yield None  # the end: all that still waits is given back


def parquet_chunks(path: Path) -> tuple[Iterator[pd.DataFrame], int]:
    """Chunks of a Parquet file, indexed by row of the whole file, and the number of rows.

    Raises:
        InputError: It cannot be read as Parquet.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(
            "A path must be that of a Parquet file",
            where=path,
            found=error,
            hint="read the file yourself and pass a DataFrame; a text is passed as str, not as "
            "Path",
        ) from None
    return _frames(file), file.metadata.num_rows


def _frames(file: Any) -> Iterator[pd.DataFrame]:
    begin = 0
    with file:
        for batch in file.iter_batches(batch_size=_CHUNK):
            frame = batch.to_pandas()  # numbered from 0 again in each batch
            yield frame.set_index(pd.RangeIndex(begin, begin + len(frame)))
            begin += len(frame)
