"""Chat templates, rendered by transformers within a budget.

A template is a program of the artifact. Jinja's sandbox keeps it from Python, but neither from a
loop without end nor from a text of a terabyte. Here the size of each text and list is bounded
before an operator, filter or call makes it, and a rendering of more than a second, or a gigabyte of
small steps, is interrupted.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlflow_safeflavor.module.bounds import within

__all__ = ["render"]

# Characters; the longest known one has some 20,000.
_LONGEST_TEMPLATE = 200_000
# Characters of a text, or items of a list.
_LONGEST = 2**22
# A number that a call is given. Jinja's sandbox ends ranges here, too.
_LARGEST = 100_000
# A result of several texts is at most as long as their product, and in honest templates far less:
# the bound is that product divided by this.
_SLACK = 16
_SECONDS = 1.0

# Filters and methods whose result can be longer than their arguments.
_GROWING = frozenset(
    (
        *(
            "replace",
            "join",
            "translate",
            "expandtabs",
            "format",
            "format_map",
            "ljust",
            "rjust",
            "center",
            "zfill",
        ),
        *(
            "indent",
            "wordwrap",
            "batch",
            "slice",
            "tojson",
            "xmlattr",
            "pprint",
            "urlize",
            "urlencode",
            "lipsum",
        ),
    )
)
# Of a format: "%99999d", "{:99999}", or a width that is an argument.
_WIDTH = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)|\{[^}]*:[^}]*(\d{5}|\{)")


def render(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The prompt of a chat, as ``tokenizer.apply_chat_template`` makes it.

    The assistant's turn is begun, or continued where the last message is its own.

    Raises:
        StructureError: It takes too much time or memory.
        Exception: Of any kind, as the template pleases.
    """
    from transformers.utils import chat_template_utils

    goes_on = messages[-1]["role"] == "assistant"
    render_by_transformers = types.FunctionType(
        chat_template_utils.render_jinja_template.__code__,
        # Its own function with one name exchanged: the loop around it is transformers', release by
        # release.
        {**vars(chat_template_utils), "_compile_jinja_template": _compile},
        argdefs=chat_template_utils.render_jinja_template.__defaults__,
    )
    render_by_transformers.__kwdefaults__ = chat_template_utils.render_jinja_template.__kwdefaults__
    make = functools.partial(
        render_by_transformers,
        conversations=[list(messages)],
        chat_template=tokenizer.get_chat_template(),
        add_generation_prompt=not goes_on,
        continue_final_message=goes_on,
        **tokenizer.special_tokens_map,
    )
    words = {"what": "Rendering a chat", "where": "the chat template"}
    (rendered,), _ = within(0, make, most_seconds=_SECONDS, objects=0, first_look=0.05, **words)
    return str(rendered)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> Template:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    if len(source) > _LONGEST_TEMPLATE:
        raise SecurityError(f"a chat template of {len(source):,} characters")
    environment = _compile_jinja_template("").environment.overlay(optimized=False)
    # transformers' environment with its own filters, globals and tags; only its class is bounded.
    environment.__class__ = _Environment
    environment.filters = {
        name: _bounded(name, function) for name, function in environment.filters.items()
    }
    template: Template = environment.from_string(source)
    return template


class _Generator(CodeGenerator):
    # ``a ~ b`` compiles to a function of Jinja's runtime, of which no environment is asked.
    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.join((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of transformers, with no text or list longer than ``_LONGEST``."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        kept, length = [], 0
        for part in parts:
            kept.append(part)
            length += len(part)
            _require(length)
        return "".join(kept)

    def join(self, parts: Iterable[Any]) -> str:
        """``a ~ b``."""
        return self.concat(map(str, parts))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            _require(_size(left) + _size(right))
        elif operator == "*":
            _require(_product((left, right)))
        elif operator == "**":  # 9 ** 9 ** 9 is one step of C, which nothing interrupts
            _require(
                _product((left,) * min(right, 100) if isinstance(right, int) else (left, right))
            )
        elif isinstance(left, str):
            _require_format(left, (right,))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``"…".format``, which the sandbox replaces by a function of its own."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def call(*args: Any, **kwargs: Any) -> str:
            _require_format(value.__self__, (*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return call

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        given = (owner, *args, *kwargs.values())
        _require_arguments(getattr(function, "__name__", ""), given)
        return _required(super().call(context, function, *args, **kwargs))


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    skipped = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _require_arguments(name, (*args[skipped:], *kwargs.values()))
        return _required(function(*args, **kwargs))

    return call


def _require_arguments(name: str, given: Sequence[Any]) -> None:
    for value in given:
        if isinstance(value, int) and abs(value) > _LARGEST:
            raise SecurityError(f"{name} is given a number beyond {_LARGEST:,}")
    if name in ("format", "format_map"):
        _require_format(str(given[0]), given[1:])
    if name == "replace":  # what is looked for makes nothing longer
        given = (given[0], *given[2:3])
    if name in _GROWING:
        _require(_product(given) // _SLACK)


def _require_format(text: str, given: Sequence[Any]) -> None:
    if _WIDTH.search(text):
        raise SecurityError("a format with a width of its own")
    _require(_product((text, *given)) // _SLACK)


def _product(given: Iterable[Any]) -> int:
    size = 1
    for value in given:
        size *= max(1, _size(value))
    return size


def _required(result: Any) -> Any:
    _require(_size(result) if isinstance(result, (str, list, tuple, dict)) else 0)
    return result


def _require(size: int) -> None:
    if size > _LONGEST:
        raise SecurityError(f"a text or list beyond {_LONGEST:,}")


def _size(value: Any) -> int:
    """Length of a text, value of a number, or summed length of a list's items."""
    if isinstance(value, (int, float)):
        return min(abs(int(value)), 2**62) if value == value and abs(value) != float("inf") else 1
    if isinstance(value, (list, tuple)):
        return sum(len(item) if isinstance(item, str) else 1 for item in value)
    return len(value) if isinstance(value, (str, bytes, dict)) else 1
