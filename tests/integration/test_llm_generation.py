"""``llm/v1/chat`` and ``llm/v1/completions``: OpenAI's requests and answers, as MLflow has them."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import mlflow
import pandas as pd
import pytest
import torch
from writers import DECODERS, byte_tokenizer, writer

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError, StructureError

CHAT, COMPLETIONS = "llm/v1/chat", "llm/v1/completions"
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is the cat? 😀"},
]
ASKED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    COMPLETIONS: {"prompt": "on the other hand, the cat"},
}
ENDS = {"eos_token_id": [2, *range(30, 50)]}


def save(path, task, *, name="LlamaForCausalLM", generation=None, **options):
    tokenizer = byte_tokenizer(bos=True, chat=True)
    model = writer(name, generation=ENDS if generation is None else generation)
    given = {"tokenizer": tokenizer, "params": {"model": "tiny"}, "rehearse": False, "graph": "no"}
    mlflow_safeflavor.save_model(model, path, task=task, **{**given, **options})
    return path


# Saved once for all tests of a task, none of which changes what it is handed.


@pytest.fixture(scope="module", params=[CHAT, COMPLETIONS])
def task(request):
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory, task):
    return tmp_path_factory.mktemp("llm")


@pytest.fixture(scope="module")
def saved(folder, task):
    # Beside the 52 tokens of a golden chat there is room for no more than 44.
    return save(folder / "model", task, params={"model": "tiny", "max_tokens": 12})


@pytest.fixture(scope="module")
def both(saved):
    """The model natively, and through pyfunc."""
    return mlflow_safeflavor.load_model(saved), mlflow.pyfunc.load_model(str(saved))


@pytest.fixture(scope="module")
def plain(folder, task):
    """Texts of the same model under ``text-generation``."""
    columns = {"messages": "messages"} if task == CHAT else {"text": "text"}
    path = save(folder / "plain", "text-generation", input_columns=columns, params={})
    loaded = mlflow_safeflavor.load_model(path)

    def texts(asked=None, **params):
        (column,) = columns
        row = {column: next(iter((asked or ASKED[task]).values()))}
        params = {"return_full_text": False, **params}
        (answer,) = loaded.predict([row], params).to_dict("records")
        wanted = answer.get("generated_texts", [answer["generated_text"]])
        reasons = answer.get("finish_reasons", [answer["finish_reason"]])
        return list(zip(wanted, reasons, strict=True))

    return texts


def text_of(choice):
    return choice["message"]["content"] if "message" in choice else choice["text"]


def require_answer(found, task, wanted, *, model="tiny"):
    """An answer of OpenAI's form with these texts and finish reasons."""
    assert set(found) == {"id", "object", "created", "model", "choices", "usage"}
    kind = {CHAT: "chat.completion", COMPLETIONS: "text_completion"}[task]
    assert (found["object"], found["model"]) == (kind, model)
    assert found["id"].startswith({CHAT: "chatcmpl-", COMPLETIONS: "cmpl-"}[task])
    assert abs(found["created"] - time.time()) < 100
    assert [choice["index"] for choice in found["choices"]] == list(range(len(wanted)))
    pairs = [(text_of(choice), choice["finish_reason"]) for choice in found["choices"]]
    assert pairs == wanted
    if task == CHAT:
        assert {choice["message"]["role"] for choice in found["choices"]} == {"assistant"}
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] > 0 < usage["completion_tokens"]


def test_the_answer_is_what_text_generation_writes(both, task, plain):
    loaded, served = both
    assert loaded.report.bit_identical
    asked = ASKED[task]
    for most in (3, 30):
        wanted = plain(max_new_tokens=most)
        for model in both:
            require_answer(model.predict({**asked, "max_tokens": most}), task, wanted)
            found = model.predict({**asked, "max_completion_tokens": most, "max_tokens": 1})
            require_answer(found, task, wanted)
            require_answer(
                model.predict(pd.DataFrame([{**asked, "max_tokens": most}])), task, wanted
            )
            require_answer(model.predict([asked], {"max_tokens": most}), task, wanted)
    assert plain(max_new_tokens=3)[0][1] == "length"
    # what the request says counts before params
    require_answer(
        served.predict({**asked, "max_tokens": 3, "model": "b"}, {"max_tokens": 9}),
        task,
        plain(max_new_tokens=3),
        model="b",
    )


def tokens_of(task):
    """What the model reads of ``ASKED``, and the tokenizer."""
    tokenizer = byte_tokenizer(bos=True, chat=True)
    prompt = (
        tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        if task == CHAT
        else ASKED[task]["prompt"]
    )
    return tokenizer(prompt, add_special_tokens=task == COMPLETIONS)["input_ids"], tokenizer


@pytest.mark.parametrize("name", DECODERS)
def test_texts_are_those_that_transformers_generates(tmp_path, task, name):
    path = save(tmp_path / "model", task, name=name, params={"max_tokens": 12})
    loaded = mlflow_safeflavor.load_model(path)
    ids, tokenizer = tokens_of(task)
    module = writer(name, generation=ENDS)
    for beams in (1, 3):
        said = {"max_new_tokens": 30, "num_beams": beams, "pad_token_id": 0, "do_sample": False}
        (written,) = module.generate(torch.tensor([ids]), **said)[:, len(ids) :]
        text = tokenizer.decode(written, skip_special_tokens=True)
        reason = "stop" if {*written.tolist()} & {*ENDS["eos_token_id"]} else "length"
        if reason == "length":  # the first part of a character is none
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        found = loaded.predict({**ASKED[task], "max_tokens": 30}, {"num_beams": beams})
        (choice,) = found["choices"]
        assert (text_of(choice), choice["finish_reason"]) == (text, reason)


def test_usage_counts_what_the_model_read_and_wrote(both, task):
    read = len(tokens_of(task)[0])
    for model in both:
        usage = model.predict({**ASKED[task], "max_tokens": 3})["usage"]
        assert usage == {
            "prompt_tokens": read,
            "completion_tokens": 3,
            "total_tokens": read + 3,
        }


def test_temperature_and_n_draw_and_zero_does_not(both, task, plain):
    drawn = plain(do_sample=True, temperature=1.5, seed=5, max_new_tokens=9, num_return_sequences=3)
    assert len(set(drawn)) > 1
    for model in both:
        asked = {**ASKED[task], "max_tokens": 9, "n": 3, "temperature": 1.5, "seed": 5}
        require_answer(model.predict(asked), task, drawn)
        greedy = model.predict({**ASKED[task], "max_tokens": 9, "temperature": 0.0})
        require_answer(greedy, task, plain(max_new_tokens=9))
    beams = plain(num_beams=3, num_return_sequences=2, max_new_tokens=9)
    require_answer(
        both[0].predict(ASKED[task], {"num_beams": 3, "n": 2, "max_tokens": 9}), task, beams
    )


def test_stop_is_a_text_or_a_list(both, task, plain):
    ((whole, _),) = plain(max_new_tokens=20)
    stop = next(letter for letter in whole[1:] if whole.index(letter) > 0 and letter.isprintable())
    wanted = [(whole.split(stop)[0], "stop")]
    for model in both:
        for value in (stop, [stop], ["never there", stop]):
            asked = {**ASKED[task], "max_tokens": 20, "stop": value}
            require_answer(model.predict(asked), task, wanted)
        nothing = {**ASKED[task], "max_tokens": 20, "stop": None, "temperature": None}
        require_answer(model.predict(nothing), task, [(whole, plain(max_new_tokens=20)[0][1])])
    require_answer(both[0].predict(ASKED[task], {"stop": stop, "max_tokens": 20}), task, wanted)


def test_the_generation_config_tells_the_defaults(tmp_path, task):
    said = {"do_sample": True, "temperature": 0.5, "max_new_tokens": 7, "top_k": 9}
    drawing = mlflow_safeflavor.load_model(save(tmp_path / "draws", task, generation=said))
    found = drawing.task.check_params({})
    assert (found["do_sample"], found["temperature"], found["max_new_tokens"]) == (True, 0.5, 7)
    assert found["top_k"] == 9
    assert drawing.task.check_params({"temperature": 0})["do_sample"] is False
    beams = {"num_beams": 3, "num_return_sequences": 2, "stop_strings": "x"}
    searching = mlflow_safeflavor.load_model(save(tmp_path / "beams", task, generation=beams))
    found = searching.task.check_params({})
    assert (found["num_beams"], found["num_return_sequences"], found["stop"]) == (3, 2, ["x"])
    assert searching.task.check_params({"temperature": 0.5})["num_beams"] == 1


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"n": 2}, r"'n'[\s\S]*temperature above 0"),
        ({"n": 0}, "'n'"),
        ({"stream": True}, r"'stream'[\s\S]*predict_stream"),
        ({"temperature": -1.0}, "'temperature'"),
        ({"max_tokens": 0}, "'max_tokens'"),
        ({"max_tokens": 95}, r"'max_tokens'[\s\S]*94"),
        ({"max_tokens": 4, "min_new_tokens": 5}, "'min_new_tokens'"),
        ({"frequency_penalty": 0.5}, r"'frequency_penalty'[\s\S]*repetition_penalty"),
        ({"presence_penalty": 0.5}, "'presence_penalty'"),
        ({"stop": ""}, "'stop'"),
        ({"stop": 3}, "'stop'"),
        ({"model": 3}, r"model"),
    ],
    ids=str,
)
def test_what_cannot_be_asked_is_named(both, task, wrong, named):
    for model in both:
        with pytest.raises(mlflow.exceptions.MlflowException, match=named):
            model.predict({**ASKED[task], **wrong})
    with pytest.raises(InputError, match=named):
        both[0].predict(ASKED[task], wrong)


def test_rows_of_one_request_agree(both, task, tmp_path):
    rows = [{**ASKED[task], "max_tokens": most} for most in (3, 4)]
    for model in both:
        with pytest.raises(InputError, match="row 1, column 'max_tokens'"):
            model.predict(pd.DataFrame(rows))
    loaded = both[0]
    with pytest.raises(InputError, match="row 1, column 'max_tokens'"):
        loaded.predict(rows)
    with pytest.raises(InputError, match="input_columns"):
        save(tmp_path / "other", task, input_columns={"text": "question"})


@pytest.mark.parametrize("task", [COMPLETIONS], indirect=True)
def test_several_prompts_are_one_answer(both):
    loaded, served = both
    prompts = ["the cat", "a", "in her"]
    alone = [loaded.predict({"prompt": prompt, "max_tokens": 5}) for prompt in prompts]
    wanted = [(text_of(one["choices"][0]), one["choices"][0]["finish_reason"]) for one in alone]
    for model in (loaded, served):
        for data in (
            {"prompt": prompts},
            pd.DataFrame({"prompt": prompts}),
            pd.DataFrame({"prompt": [prompts]}),
        ):
            found = model.predict(data, {"max_tokens": 5})
            require_answer(found, COMPLETIONS, wanted)
            read = sum(one["usage"]["prompt_tokens"] for one in alone)
            assert found["usage"]["prompt_tokens"] == read
        require_answer(
            model.predict({"prompt": ["a", "the cat"], "max_tokens": 5, "stop": ["never"]}),
            COMPLETIONS,
            [wanted[1], wanted[0]],
        )
        for bad in ({"prompt": [[5, 6]]}, {"prompt": [5]}, {"prompt": []}, {"prompt": [None]}):
            with pytest.raises(mlflow.exceptions.MlflowException, match=r"prompt|rows"):
                model.predict(bad)


@pytest.mark.parametrize("task", [COMPLETIONS], indirect=True)
def test_a_template_and_a_chat_template(both, tmp_path):
    path = save(tmp_path / "template", COMPLETIONS, prompt_template="Q: {prompt} A:")
    found = mlflow_safeflavor.load_model(path).predict({"prompt": "why?", "max_tokens": 5})
    wanted = both[0].predict({"prompt": "Q: why? A:", "max_tokens": 5})
    assert (found["choices"], found["usage"]) == (wanted["choices"], wanted["usage"])
    with pytest.raises(InputError, match="prompt_template"):
        save(tmp_path / "chat", CHAT, prompt_template="Q: {prompt} A:")
    with pytest.raises(StructureError, match="chat template"):
        save(tmp_path / "none", CHAT, tokenizer=byte_tokenizer())


@pytest.mark.parametrize("task", [CHAT], indirect=True)
@pytest.mark.parametrize(
    "wrong", ["hello", [], ["hello"], [{"role": "user"}], [{"role": "user", "content": 1}]], ids=str
)
def test_what_is_no_chat_is_refused(both, wrong):
    loaded, served = both
    with pytest.raises(InputError, match=r"column 'messages'|no rows"):
        loaded.predict({"messages": wrong})
    with pytest.raises(mlflow.exceptions.MlflowException, match=r"messages|no rows"):
        served.predict({"messages": wrong})


def test_schema_and_metadata_are_those_of_mlflow(saved, task):
    from mlflow.types import llm

    model = mlflow.models.Model.load(str(saved))
    assert model.metadata == {"task": task}
    name = {CHAT: "CHAT", COMPLETIONS: "COMPLETIONS"}[task]
    ours = {spec.name: spec for spec in model.signature.inputs.inputs}
    theirs = {spec.name: spec for spec in getattr(llm, f"{name}_MODEL_INPUT_SCHEMA").inputs}
    for column in {"prompt", "temperature", "max_tokens", "n", "stream"} & theirs.keys():
        assert ours[column] == theirs[column]
    # tools and inputs of one's own are not done, a chat is of texts, and stop may be one text
    unlike = {"messages", "stop", "tools", "custom_inputs"}
    assert theirs.keys() - unlike <= ours.keys()
    assert [name for name, spec in ours.items() if spec.required] == list(ASKED[task])
    ours = {spec.name: spec.type for spec in model.signature.outputs.inputs}
    theirs = {spec.name: spec.type for spec in getattr(llm, f"{name}_MODEL_OUTPUT_SCHEMA").inputs}
    assert ours.keys() == theirs.keys() - {"custom_outputs"}
    same = ("id", "object", "created", "model", "usage", "choices" if task != CHAT else "id")
    assert all(ours[column] == theirs[column] for column in same)
    assert "stop" not in [param.name for param in model.signature.params.params]


def test_an_example_of_mlflows_own(tmp_path, task):
    from mlflow.types import llm

    name = {CHAT: "CHAT", COMPLETIONS: "COMPLETIONS"}[task]
    example = getattr(llm, f"{name}_MODEL_INPUT_EXAMPLE", ASKED[task])
    path = save(tmp_path / "model", task, input_example=example)
    assert mlflow_safeflavor.load_model(path).report.golden_rows > 1


# Streams.


def test_chunks_add_up_to_the_answer(both, task, plain):
    for params in ({"max_tokens": 3}, {"max_tokens": 30}, {"temperature": 1.5, "seed": 3, "n": 2}):
        for model in both:
            asked = {"max_tokens": 9, **params}
            chunks = list(model.predict_stream({**ASKED[task], **asked, "stream": True}))
            whole = model.predict({**ASKED[task], **asked})
            kind = {CHAT: "chat.completion.chunk", COMPLETIONS: "text_completion"}[task]
            assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {(kind, "tiny")}
            assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
            deltas = [choice for chunk in chunks for choice in chunk["choices"]]
            for choice in whole["choices"]:
                own = [delta for delta in deltas if delta["index"] == choice["index"]]
                added = [
                    delta["delta"].get("content", "") if task == CHAT else delta["text"]
                    for delta in own
                ]
                assert "".join(added) == text_of(choice)
                assert [delta["finish_reason"] for delta in own] == [
                    *[None] * (len(own) - 1),
                    choice["finish_reason"],
                ]
                if task == CHAT:
                    roles = [delta["delta"].get("role") for delta in own]
                    assert roles == ["assistant", *[None] * (len(own) - 1)]
    assert len(list(both[0].predict_stream({**ASKED[task], "max_tokens": 30}))) > 3


# Over HTTP.


@pytest.mark.serve
def test_clients_of_openai_read_what_a_server_answers(serve, saved, task, plain):
    asked = ASKED[task]
    with serve(saved, env={"OMP_NUM_THREADS": "1"}) as server:
        answer = server.invoke({**asked, "max_tokens": 5, "model": "mine", "nobody": "knows"})
        require_answer(answer.json(), task, plain(max_new_tokens=5), model="mine")
        rows = server.invoke({"dataframe_records": [asked], "params": {"max_tokens": 5}})
        require_answer(rows.json()["predictions"], task, plain(max_new_tokens=5))
        for bad in (
            {"n": 2},
            {"stream": True},
            {"max_tokens": "many"},
            {"stop": [3]},
            {"temperature": -1},
            {next(iter(asked)): [{"content": [5]}]},
            {next(iter(asked)): []},
        ):
            refused = server.invoke({**asked, **bad})
            assert refused.status == 400, refused.text
            assert "Traceback" not in refused.text
        frame = pd.DataFrame([asked, asked])
        report = mlflow_safeflavor.verify_model(saved, endpoint=server.url, rows=frame)
        assert report.bit_identical
        require_clients(server.url, task, plain)


def require_clients(url, task, plain):
    """What the client library returns, with a request hook that names MLflow's only path."""
    openai = pytest.importorskip("openai")

    def to_invocations(request):
        request.url = request.url.copy_with(path="/invocations")

    # The library's own: of which httpx it is changes with its releases.
    with openai.DefaultHttpxClient(event_hooks={"request": [to_invocations]}) as http_client:
        address = {"base_url": url, "api_key": "none", "http_client": http_client}
        client = openai.OpenAI(max_retries=0, **address)
        create = client.chat.completions.create if task == CHAT else client.completions.create
        ((whole, reason),) = plain(max_new_tokens=12)
        found = create(model="mine", max_tokens=12, temperature=0, **ASKED[task])
        require_answer(found.model_dump(exclude_unset=True), task, [(whole, reason)], model="mine")
        assert found.usage.total_tokens > found.usage.prompt_tokens > 0
        for stop in (whole[2], [whole[2]]):
            stopped = create(model="mine", max_tokens=12, stop=stop, **ASKED[task])
            assert stopped.choices[0].finish_reason == "stop"
        drawn = create(model="mine", max_tokens=9, temperature=1.5, seed=5, n=3, **ASKED[task])
        wanted = plain(
            do_sample=True, temperature=1.5, seed=5, max_new_tokens=9, num_return_sequences=3
        )
        require_answer(drawn.model_dump(exclude_unset=True), task, wanted, model="mine")
        with pytest.raises(openai.BadRequestError, match="predict_stream"):
            create(model="mine", stream=True, **ASKED[task])
        require_langchain(task, plain, address)


def require_langchain(task, plain, address):
    if importlib.util.find_spec("langchain_openai") is None:
        return
    langchain = importlib.import_module("langchain_openai")
    if task == CHAT:
        model = langchain.ChatOpenAI(model="mine", max_tokens=9, temperature=0, **address)
        found = model.invoke([(one["role"], one["content"]) for one in MESSAGES])
        assert found.content == plain(max_new_tokens=9)[0][0]
    else:
        model = langchain.OpenAI(model="mine", max_tokens=9, temperature=0, **address)
        assert model.invoke(ASKED[task]["prompt"]) == plain(max_new_tokens=9)[0][0]
