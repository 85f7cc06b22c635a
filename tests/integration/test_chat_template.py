"""Templates render as transformers renders them, and never more than a budget."""

import resource
import threading
import time

import pytest

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.tasks.inputs import chat_template
from mlflow_safeflavor.tasks.inputs.chat_template import render

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + "
    "'<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
HONEST = {
    "chatml": CHATML,
    "llama": "{{ bos_token }}{%- set ns = namespace(found=false) -%}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}{% "
    "endif %}"
    "{% if loop.last %}{% set ns.found = true %}{% endif %}[INST] {{ m.content.strip() ~ ' "
    "[/INST]' }}{% endfor %}"
    "{{ loop_length | default(messages | length) }}{{ ns.found }}",
    "macros": "{% macro turn(m, depth=1) %}{{ '  ' * depth }}{{ m.role | upper }}: {{ "
    "m.content.replace('a', 'bb') }}\n"
    "{% endmacro %}{% for m in messages %}{{ turn(m, loop.index) }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | tojson(indent=2) "
    "}}"
    "{% for k, v in messages[0].items() %}{{ '%s=%s' | format(k, v) }}{{ '{}'.format(v) }}{% "
    "endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if "
    "loop.index > 5 %}"
    "{% break %}{% endif %}{% endfor %}",
    "sets": "{% set text %}{% for m in messages %}{{ m.content }};{% endfor %}{% endset %}{{ text "
    "| length }}"
    "{{ text[:9] }}",
    "ranges": "{% for i in range(messages | length) %}{{ messages[i]['content'].split(' ')[0] "
    "}}{{ i ** 2 }}"
    "{% endfor %}",
}
CHATS = {
    "one": [{"role": "user", "content": "a cat, a dog"}],
    "many": [
        {"role": ("user", "assistant")[i % 2], "content": f" number {i} " * 3} for i in range(9)
    ],
    "continued": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Once upon a "},
    ],
}


@pytest.fixture
def templated(tiny_tokenizer):
    def make(template):
        tiny_tokenizer.chat_template = template
        tiny_tokenizer.add_special_tokens({"bos_token": "[CLS]"})
        return tiny_tokenizer

    return make


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", HONEST)
def test_honest_templates_render_as_in_transformers(templated, template, chat):
    tokenizer, messages = templated(HONEST[template]), CHATS[chat]
    goes_on = messages[-1]["role"] == "assistant"
    given = {
        "tokenize": False,
        "add_generation_prompt": not goes_on,
        "continue_final_message": goes_on,
    }
    try:
        wanted = tokenizer.apply_chat_template(messages, **given)
    except Exception as error:
        with pytest.raises(type(error)):
            render(tokenizer, messages)
    else:
        assert render(tokenizer, messages) == wanted


def test_a_long_chat_renders(templated):
    messages = [{"role": "user", "content": "word " * 200_000}]
    assert len(render(templated(CHATML), messages)) > 1_000_000
    messages = [{"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(4001)]
    assert (
        render(templated(HONEST["macros"].replace("loop.index", "1")), messages).count("\n") == 4001
    )


BOMBS = {
    "a range of 10^9": "{% for i in range(1000000000) %}{% endfor %}",
    "three nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in "
    "range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a text times 10^10": "{{ 'x' * 10000000000 }}",
    "times times": "{{ 'x' * 99999 * 99999 }}",
    "a list times 10^9": "{{ ([0] * 1000000000) | length }}",
    "a number of digits": "{{ (9 ** 9 ** 9) }}",
    "doubling": "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(60) %}{% set ns.s = ns.s "
    "~ ns.s %}"
    "{% endfor %}",
    "doubling by plus": "{% set ns = namespace(s=[0]) %}{% for i in range(60) %}{% set ns.s = "
    "ns.s + ns.s %}"
    "{% endfor %}",
    "much output": "{% set s = 'x' * 99999 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "much output of a macro": "{% set s = 'x' * 99999 %}{% macro m() %}{% for i in range(99999) "
    "%}{{ s }}{% endfor %}"
    "{% endmacro %}{{ m() | length }}",
    "much in a block": "{% set s = 'x' * 99999 %}{% set t %}{% for i in range(99999) %}{{ s }}{% "
    "endfor %}{% endset %}",
    "deep recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "wide recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% "
    "endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in range(999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "a format": "{{ '%9999999999d' % 1 }}",
    "a format of braces": "{{ '{:9999999999}'.format(1) }}",
    "a nested format": "{{ '{:{}}'.format(1, 99999) }}",
    "a filter's format": "{{ '%9999999999d' | format(1) }}",
    "replace": "{% set s = 'x' * 99999 %}{{ s.replace('x', s) }}",
    "join": "{% set s = 'x' * 99999 %}{{ s.join(s) }}",
    "join of a filter": "{% set s = 'x' * 99999 %}{{ s | join(s) }}",
    "indent": "{% set s = 'x\n' * 99999 %}{{ s | indent(99999) }}",
    "json": "{{ [[[[[[1]]]]]] | tojson(indent=9999999999) }}",
    "ipsum": "{{ lipsum(n=1000000) }}",
    "a long template": "{# " + "x" * 200_000 + " #}",
    "comparisons": "{% set s = 'x' * 99999 %}{% set t = [s] * 99999 %}{% for i in range(99999) "
    "%}{{ 1 in t }}"
    "{% endfor %}",
    "sums": "{% for i in range(99999) %}{% set n = range(99999) | sum %}{% endfor %}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_time_and_memory(templated, name, monkeypatch):
    monkeypatch.setattr(chat_template, "_SECONDS", 0.3)
    tokenizer, threads = templated(BOMBS[name]), threading.active_count()
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    with pytest.raises(Exception) as caught:  # noqa: PT011  (Jinja's, Python's or ours: the task names them all)
        render(tokenizer, CHATS["one"])
    assert not isinstance(caught.value, MemoryError), "the machine refused, not we"
    assert time.thread_time() - begin < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000, "kilobytes"
    assert threading.active_count() == threads


def test_an_interrupted_template_says_so(templated):
    with pytest.raises(StructureError, match="Rendering a chat takes far more") as caught:
        render(templated(BOMBS["three nested ranges"]), CHATS["one"])
    assert caught.value.where == "the chat template"
    assert "1 seconds" in str(caught.value.found)
    assert render(templated(CHATML), CHATS["one"])  # nothing stays
