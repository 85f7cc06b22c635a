"""Files as values of cells: images and sounds, as bytes.

Texts are never taken for paths. Over HTTP every value of JSON is a text, so a server that opened
the file of that name would read its own files to any client. A path is a ``pathlib.Path``, which no
request can contain.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from pathlib import Path
from typing import Any

from mlflow_safeflavor.errors import InputError

__all__ = ["MAX_BYTES", "content_of", "is_file_like"]

# Largest file that is read, or decoded from base64.
MAX_BYTES = 100_000_000

_DATA_URL = re.compile(r"data:[\w.+/-]*(;[\w=.+-]+)*;base64,")
_BASE64 = re.compile(rb"[A-Za-z0-9+/=\s]+")
_LOOKED_AT = 64


def is_file_like(value: Any) -> bool:
    """Whether a value can only be a file: bytes, base64 text or a path."""
    return isinstance(value, (bytes, bytearray, memoryview, str, os.PathLike))


def content_of(value: Any, where: str) -> bytes:
    """The bytes of a file, given as ``bytes``, base64 text, ``data:`` URL or ``pathlib.Path``.

    Args:
        value: For which ``is_file_like`` is true.
        where: Row and column, for messages.

    Raises:
        InputError: The text is no base64, the path names no plain file, or there is nothing in it,
            or too much.
    """
    if isinstance(value, os.PathLike):
        return _read(Path(value), where)
    if isinstance(value, str):
        # The beginning alone: the pattern's repetitions would be tried over 100 MB.
        text = value[found.end() :] if (found := _DATA_URL.match(value[:200])) else value
        return _decode(text.encode("ascii", "replace"), where)
    content = _sized(bytes(value), len(value), where)
    # Base64 may come as bytes, too: MLflow decodes a column of type binary in dataframe_split and
    # dataframe_records, but not in inputs and instances. No image or sound begins with 64 letters.
    return _decode(content, where) if _BASE64.fullmatch(content[:_LOOKED_AT]) else content


def _decode(text: bytes, where: str) -> bytes:
    _sized(text, len(text) * 3 // 4, where)  # 4 letters are 3 bytes: refused before it is decoded
    try:
        return base64.b64decode(text.translate(None, b" \t\r\n"), validate=True)
    except binascii.Error as error:
        raise InputError(
            "A text is no file in base64",
            where=where,
            wanted="the bytes of a file in base64, or a data: URL",
            found=f"{text[:40].decode()!a} …: {error}",
            hint="pass the file's bytes, or pathlib.Path(…) for its path: a text is never taken "
            "for a path",
        ) from None


def _read(path: Path, where: str) -> bytes:
    try:
        # A pipe or device could block for ever, or never end.
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a plain file")
        _sized(b"", status.st_size, where)  # before a byte is read
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(
            "A file cannot be read", where=where, wanted="a plain file", found=error
        ) from None


def _sized(content: bytes, size: int, where: str) -> bytes:
    if not 0 < size <= MAX_BYTES:
        raise InputError(
            "A file is empty" if size == 0 else "A file is too large",
            where=where,
            wanted=f"1 to {MAX_BYTES:,} bytes",
            found=f"{size:,} bytes",
        )
    return content
