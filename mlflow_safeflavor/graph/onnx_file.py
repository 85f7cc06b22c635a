"""``graph.onnx`` read without the onnx package, as strictly as a check needs it.

A model is a protobuf message. ONNX Runtime reads it with a parser of its own, so what is looked at
here must be what that parser sees: every field is one of the tables below and of its type, no field
that stands once comes twice, and nothing is left over. What a recorded forward never has
(subgraphs, functions, training, sparse tensors, texts for people) is in no table.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Malformed", "parse_model", "write_model"]


class Malformed(ValueError):
    """The bytes are no model that a save writes; names the offset."""


@dataclass(frozen=True)
class _Field:
    """One field of a message: its name, its type, and whether it may come more than once."""

    name: str
    kind: str | Mapping[int, _Field]
    repeated: bool = False


def _message(**fields: tuple[int, Any] | tuple[int, Any, bool]) -> dict[int, _Field]:
    return {
        number: _Field(name, kind, bool(rest)) for name, (number, kind, *rest) in fields.items()
    }


# Numbers and types from onnx.proto3 of the ONNX standard, IR version 10.
_PAIR = _message(key=(1, "text"), value=(2, "text"))
_TENSOR = _message(
    dims=(1, "int", True), data_type=(2, "int"), name=(8, "text"), raw_data=(9, "bytes"),
    external_data=(13, _PAIR, True), data_location=(14, "int"),
)  # fmt: skip
_ATTRIBUTE = _message(
    name=(1, "text"), type=(20, "int"), f=(2, "float"), i=(3, "int"), s=(4, "bytes"),
    t=(5, _TENSOR), floats=(7, "float", True), ints=(8, "int", True), strings=(9, "bytes", True),
)  # fmt: skip
_NODE = _message(
    input=(1, "text", True), output=(2, "text", True), name=(3, "text"), op_type=(4, "text"),
    domain=(7, "text"), attribute=(5, _ATTRIBUTE, True),
)  # fmt: skip
_DIMENSION = _message(dim_value=(1, "int"), dim_param=(2, "text"))
_SHAPE = _message(dim=(1, _DIMENSION, True))
_VALUE = _message(
    name=(1, "text"),
    type=(2, _message(tensor_type=(1, _message(elem_type=(1, "int"), shape=(2, _SHAPE))))),
)
_GRAPH = _message(
    node=(1, _NODE, True), name=(2, "text"), initializer=(5, _TENSOR, True),
    input=(11, _VALUE, True), output=(12, _VALUE, True),
)  # fmt: skip
_MODEL = _message(
    ir_version=(1, "int"), opset_import=(8, _message(domain=(1, "text"), version=(2, "int")), True),
    producer_name=(2, "text"), graph=(7, _GRAPH),
)  # fmt: skip

# Wire types of protobuf: a varint, four bytes, and for all else, packed numbers included, bytes
# behind their length. Groups (3 and 4) and eight bytes (1) are in no field that a save writes.
_WIRES = {"int": 0, "float": 5}
_LENGTH = 2

# Of a model, messages and packed numbers included. Two bytes of a file may be a message, which
# takes 500 in Python: 48 million of them were 20 GB.
_MOST_VALUES = 400_000


def parse_model(content: bytes) -> dict[str, Any]:
    """The fields of a model by name; lists where a field is repeated, left out where it is absent.

    Raises:
        Malformed: It is no such message.
    """
    return _Reader().message(memoryview(content), _MODEL, "model")


def write_model(model: Mapping[str, Any]) -> bytes:
    """The bytes of a model that was read, and perhaps changed since."""
    return _written(model, _MODEL)


def _written(message: Mapping[str, Any], fields: Mapping[int, _Field]) -> bytes:
    parts = []
    for number, field in fields.items():
        tag, kind = number << 3, field.kind
        found = message.get(field.name, [])
        for value in found if field.repeated else [found] * (field.name in message):
            if kind == "int":
                parts += [_as_varint(tag), _as_varint(value)]
            elif kind == "float":
                parts += [_as_varint(tag | _WIRES["float"]), struct.pack("<f", value)]
            else:
                content: Any = value if isinstance(kind, str) else _written(value, kind)
                content = content.encode() if kind == "text" else content
                parts += [_as_varint(tag | _LENGTH), _as_varint(len(content)), content]
    return b"".join(parts)


def _as_varint(number: int) -> bytes:
    number &= (1 << 64) - 1  # int64 in two's complement
    found = bytearray()
    while number > 0x7F:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


class _Reader:
    """Reads one model; ``left`` is how many more values it may have."""

    def __init__(self) -> None:
        self.left = _MOST_VALUES

    def message(
        self, content: memoryview, fields: Mapping[int, _Field], where: str
    ) -> dict[str, Any]:
        found: dict[str, Any] = {field.name: [] for field in fields.values() if field.repeated}
        offset = 0
        while offset < len(content):
            tag, offset = _varint(content, offset)
            # A tag is the field's number and, in its last three bits, the wire type.
            field = fields.get(tag >> 3)
            if field is None:
                raise Malformed(f"{where} has field {tag >> 3}, which no save writes")
            values, offset = self._values(content, offset, field, tag & 7, f"{where}.{field.name}")
            if field.repeated:
                found[field.name] += values
            # protobuf merges two messages, and takes the last of two numbers.
            elif field.name in found:
                raise Malformed(f"{where}.{field.name} comes twice")
            else:
                (found[field.name],) = values
        return found

    def _values(
        self, content: memoryview, offset: int, field: _Field, wire: int, where: str
    ) -> tuple[list[Any], int]:
        """Values of one occurrence of a field, several where packed, and the offset behind it."""
        kind = field.kind
        own = _WIRES.get(kind, _LENGTH) if isinstance(kind, str) else _LENGTH
        if wire == own != _LENGTH:
            value, offset = self._number(content, offset, str(kind), where)
            return [value], offset
        # Numbers of a repeated field may be packed behind a length, or come one by one.
        if wire != _LENGTH or (own != _LENGTH and not field.repeated):
            raise Malformed(f"{where} is of another type")
        length, start = _varint(content, offset)
        offset = start + length
        if offset > len(content):
            raise Malformed(f"{where} ends behind the end")
        part = content[start:offset]
        if isinstance(kind, str) and own != _LENGTH:
            return list(self._packed(part, kind, where)), offset
        self._count(where)
        if not isinstance(kind, str):
            return [self.message(part, kind, where)], offset
        if kind == "bytes":
            return [bytes(part)], offset
        try:
            return [str(part, "utf-8")], offset
        except UnicodeDecodeError:
            raise Malformed(f"{where} is no text") from None

    def _packed(self, part: memoryview, kind: str, where: str) -> Iterator[int | float]:
        offset = 0
        while offset < len(part):
            value, offset = self._number(part, offset, kind, where)
            yield value

    def _number(
        self, content: memoryview, offset: int, kind: str, where: str
    ) -> tuple[int | float, int]:
        self._count(where)
        if kind == "int":
            value, offset = _varint(content, offset)
            return value - (1 << 64) if value >> 63 else value, offset  # int64 in two's complement
        if offset + 4 > len(content):
            raise Malformed(f"{where} ends behind the end")
        return struct.unpack_from("<f", content, offset)[0], offset + 4

    def _count(self, where: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise Malformed(f"{where}: more than {_MOST_VALUES} values")


def _varint(content: memoryview, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if offset >= len(content) or shift > 63:
            raise Malformed(f"no number at byte {offset}")
        byte = content[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            # Ten bytes of seven bits hold 70: protobuf would drop the bits beyond 64.
            if value >> 64:
                raise Malformed(f"a number of more than 64 bits before byte {offset}")
            return value, offset
