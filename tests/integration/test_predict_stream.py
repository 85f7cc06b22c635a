"""``predict_stream`` of the tasks that write: parts that add up to what ``predict`` answers."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import mlflow
import pytest
from writers import byte_tokenizer, writer

import mlflow_safeflavor
from mlflow_safeflavor.errors import AnswerError, DeadlineError, InputError
from mlflow_safeflavor.tasks.stop_texts import unfinished_stop
from mlflow_safeflavor.tasks.written import settled_text

TEXTS = ["the cat", "Zürich 😀", "in her"]


def save(path, name="LlamaForCausalLM", tokenizer=None, **options):
    model, tokenizer = writer(name), tokenizer or byte_tokenizer(eos=name.startswith("T5"))
    mlflow_safeflavor.save_model(
        model, path, tokenizer=tokenizer, rehearse=False, graph="no", **options
    )
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("stream") / "model")


@pytest.fixture
def loaded(saved):
    """Of each test its own: some change its engine."""
    return mlflow_safeflavor.load_model(saved)


_ASKED = [
    {"max_new_tokens": 1},
    {"max_new_tokens": 30},
    {"max_new_tokens": 30, "return_full_text": False},
    {"max_new_tokens": 20, "do_sample": True, "seed": 4, "repetition_penalty": 1.5},
    {"max_new_tokens": 9, "num_beams": 3, "min_new_tokens": 4},
]


@pytest.mark.parametrize("asked", _ASKED, ids=str)
def test_parts_add_up(loaded, asked):
    for text in TEXTS:
        parts = list(loaded.predict_stream(text, asked))
        assert all(parts)
        (whole,) = loaded.predict([text], asked)["generated_text"]
        assert "".join(parts) == whole
    if asked["max_new_tokens"] > 20:
        assert len(parts) > 4


def test_parts_of_an_encoder_decoder_and_of_a_chat(tmp_path):
    t5 = mlflow_safeflavor.load_model(save(tmp_path / "t5", "T5ForConditionalGeneration"))
    asked = {"max_new_tokens": 12, "do_sample": True, "seed": 1}
    whole = t5.predict(["the cat"], asked)["generated_text"][0]
    assert "".join(t5.predict_stream({"text": "the cat"}, asked)) == whole
    chat = mlflow_safeflavor.load_model(
        save(
            tmp_path / "chat",
            tokenizer=byte_tokenizer(chat=True),
            input_columns={"messages": "messages"},
        )
    )
    row = {"messages": [{"role": "user", "content": "Hello!"}]}
    whole = chat.predict(row, {"max_new_tokens": 9})["generated_text"][0]
    assert "".join(chat.predict_stream(row, {"max_new_tokens": 9})) == whole


def test_a_stop_text_is_in_no_part(loaded):
    (whole,) = loaded.predict(["the cat"], {"max_new_tokens": 30, "return_full_text": False})[
        "generated_text"
    ]
    for i in range(1, len(whole) - 3):
        asked = {"max_new_tokens": 30, "return_full_text": False, "stop": [whole[i : i + 3]]}
        parts = list(loaded.predict_stream("the cat", asked))
        assert "".join(parts) == whole.split(whole[i : i + 3])[0]


@pytest.mark.parametrize(
    ("text", "stop", "index"),
    [
        *(("abc", [], 3), ("abc", ["cd"], 2), ("abc", ["x", "bcd"], 1)),
        *(("aaa", ["aab"], 1), ("", ["a"], 0)),
    ],
)
def test_what_may_become_a_stop_text_is_kept_back(text, stop, index):
    assert unfinished_stop(text, stop) == index


def test_where_decoding_changes_words_only_whole_ones_are_settled():
    class Encoder:
        changes_words = True

        @staticmethod
        def decode(ids):
            return " ".join(ids).replace(" ##", "").replace(" .", ".")

    words = ["play", "##ing", "cards", ".", "the", "end"]
    sent = ""
    for i in range(1, len(words) + 1):
        settled = settled_text(Encoder, cast("list[int]", words[:i]), [])
        assert settled.startswith(sent)
        assert Encoder.decode(words).startswith(settled)
        sent = settled
    assert sent == "playing cards. the"


def test_through_pyfunc(tmp_path):
    path = save(tmp_path / "model", input_columns={"text": "prompt"})
    served = mlflow.pyfunc.load_model(str(path))
    (whole,) = served.predict({"prompt": ["the cat"]}, {"max_new_tokens": 20})["generated_text"]
    found = served.predict_stream({"prompt": "the cat"}, {"max_new_tokens": 20})
    assert "".join(found) == whole
    unnamed = mlflow.pyfunc.load_model(str(save(tmp_path / "unnamed")))
    assert "".join(unnamed.predict_stream("the cat", {"max_new_tokens": 20})) == whole


@pytest.mark.parametrize(
    ("data", "params", "named"),
    [
        (["a", "b"], {}, "one row"),
        ([], {}, "rows"),
        ("a", {"max_new_tokens": 0}, "'max_new_tokens'"),
        ("a", {"num_beams": 2, "num_return_sequences": 2}, "'num_return_sequences'"),
        ("a", {"nobody": 1}, "'nobody'"),
        ({"text": 3}, {}, "row 0"),
    ],
    ids=str,
)
def test_what_cannot_be_streamed_is_named(loaded, data, params, named):
    with pytest.raises(InputError, match=named):
        next(loaded.predict_stream(data, params))


def test_other_tasks_answer_in_one_piece(tmp_path, tiny_bert, tiny_tokenizer):
    path = tmp_path / "model"
    mlflow_safeflavor.save_model(
        tiny_bert(), path, tokenizer=tiny_tokenizer, rehearse=False, graph="no"
    )
    with pytest.raises(InputError, match=r"one piece[\s\S]*call predict"):
        mlflow_safeflavor.load_model(path).predict_stream("a cat")
    with pytest.raises(mlflow.exceptions.MlflowException, match="not support predict_stream"):
        list(mlflow.pyfunc.load_model(str(path)).predict_stream("a cat"))


def test_who_stops_listening_ends_the_text(loaded):
    steps = []
    generate = loaded.engine.generate

    def counted(inputs, generation):
        def count(ids, scores, **_):
            steps.append(ids.shape[1])
            time.sleep(0.01)
            return ids[:, 0] < 0

        stopping = [*generation.stopping, count]
        return generate(inputs, type(generation)(**{**vars(generation), "stopping": stopping}))

    object.__setattr__(loaded.engine, "generate", counted)
    parts = loaded.predict_stream("the cat", {"max_new_tokens": 90, "return_full_text": False})
    next(parts)
    parts.close()
    assert len(loaded.predict(["a"], {"max_new_tokens": 1})) == 1  # once the model is free
    assert len(steps) < 45
    with pytest.raises(DeadlineError, match="not finished"):
        list(loaded.predict_stream("the cat", {"max_new_tokens": 90}, timeout=0.2))


def test_a_model_that_fails_while_it_writes(loaded):
    def fail(inputs, generation):
        raise ZeroDivisionError("no")

    object.__setattr__(loaded.engine, "generate", fail)
    with pytest.raises(AnswerError, match="ZeroDivisionError"):
        list(loaded.predict_stream("a", {"max_new_tokens": 3}))


def test_streams_and_tables_beside_each_other(loaded):
    asked = {"max_new_tokens": 15}
    wanted = loaded.predict(TEXTS, asked)["generated_text"].tolist()
    with ThreadPoolExecutor(4) as pool:
        tables = [pool.submit(loaded.predict, TEXTS, asked) for _ in range(3)]
        streams = list(
            pool.map(lambda text: "".join(loaded.predict_stream(text, asked)), TEXTS * 4)
        )
    assert streams == wanted * 4
    assert all(table.result()["generated_text"].tolist() == wanted for table in tables)


@pytest.mark.skipif(not hasattr(mlflow, "start_span_no_context"), reason="MLflow without tracing")
def test_a_stream_is_a_span_of_the_callers_trace(loaded, tracking):
    with mlflow.start_span("mine"):
        parts = list(loaded.predict_stream("the cat", {"max_new_tokens": 5}))
    assert parts
    mlflow.flush_trace_async_logging()
    (trace,) = mlflow.search_traces(return_type="list")
    found = {span.name: span for span in trace.data.spans}
    stream = found["safeflavor text-generation"]
    assert stream.parent_id == found["mine"].span_id
    told = {name: stream.attributes[name] for name in ("rows", "pieces", "forwards", "engine")}
    assert told == {"rows": 1, "pieces": 1, "forwards": 1, "engine": "module"}
    assert found["forwards"].parent_id == stream.span_id
