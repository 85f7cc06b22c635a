"""``task="llm/v1/embeddings"``: OpenAI's requests and answers, as MLflow's flavors have them."""

from __future__ import annotations

import base64
import inspect
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from architectures import tiny_model

import mlflow_safeflavor
from mlflow_safeflavor.errors import InputError

TASK = "llm/v1/embeddings"
TEXTS = ["the cat sat on the mat", "a", "dog " * 60]
TOKENS = [8, 3, 32]  # what the tokenizer of the fixture makes of them, cut to 32


# Saved once for all tests, none of which changes what it is handed.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llm")


@pytest.fixture
def saved(folder, tiny_tokenizer):
    path = folder / "model"
    if path.exists():
        return path
    options = {"tokenizer": tiny_tokenizer, "task": TASK, "params": {"model": "tiny"}}
    options["model_config"] = {"normalize": True, "prompts": {"query": "find the "}}
    mlflow_safeflavor.save_model(
        tiny_model("Bert", "Model"), path, rehearse=False, graph="no", **options
    )
    return path


@pytest.fixture
def wanted(folder, tiny_tokenizer):
    """Embeddings of the same model by the task ``feature-extraction``, and of others by name."""
    path = folder / "plain"
    options = {"tokenizer": tiny_tokenizer, "model_config": {"normalize": True}}
    if not path.exists():
        mlflow_safeflavor.save_model(
            tiny_model("Bert", "Model"), path, rehearse=False, graph="no", **options
        )
    loaded = mlflow_safeflavor.load_model(path)
    return lambda texts=TEXTS, **params: loaded.predict(texts, params)["embedding"].tolist()


def require_answer(found, vectors, tokens, model="tiny"):
    assert list(found) == ["object", "data", "model", "usage"]
    assert (found["object"], found["model"]) == ("list", model)
    assert [(datum["object"], datum["index"]) for datum in found["data"]] == [
        ("embedding", i) for i in range(len(vectors))
    ]
    got = np.array([datum["embedding"] for datum in found["data"]])
    assert got == pytest.approx(np.array(vectors), abs=1e-6)
    assert found["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_every_shape_of_a_request_is_answered_as_openai_does(saved, wanted):
    loaded, served = mlflow_safeflavor.load_model(saved), mlflow.pyfunc.load_model(str(saved))
    assert loaded.report.bit_identical
    many = [
        {"input": TEXTS},
        pd.DataFrame({"input": TEXTS}),
        pd.DataFrame({"input": [TEXTS]}),
        [{"input": text} for text in TEXTS],
        [{"input": TEXTS}],
    ]
    for data in many:
        require_answer(loaded.predict(data), wanted(), sum(TOKENS))
        require_answer(served.predict(data), wanted(), sum(TOKENS))
    for data in ({"input": "a"}, {"input": ["a"]}, pd.DataFrame({"input": ["a"]})):
        require_answer(loaded.predict(data), wanted(["a"]), 3)
        require_answer(served.predict(data), wanted(["a"]), 3)
    # MLflow asks for the name that the signature says
    require_answer(loaded.predict(TEXTS), wanted(), sum(TOKENS))
    require_answer(loaded.predict("a"), wanted(["a"]), 3)


@pytest.mark.parametrize("architecture", ["Bert", "Roberta", "DistilBert", "Albert"])
def test_embeddings_are_those_of_the_model(tmp_path, tiny_tokenizer, architecture):
    """The mean of what transformers' own model gives, text by text."""
    module: Any = tiny_model(architecture, "Model")
    taken = inspect.signature(module.forward).parameters
    given = {"tokenizer": tiny_tokenizer, "task": TASK, "rehearse": False, "graph": "no"}
    mlflow_safeflavor.save_model(module, tmp_path / "model", **given)
    found = mlflow_safeflavor.load_model(tmp_path / "model").predict({"input": TEXTS})
    vectors = []
    for text in TEXTS:
        read = tiny_tokenizer(text, truncation=True, return_tensors="pt")
        with torch.no_grad():
            made = module(**{name: read[name] for name in read if name in taken})
        vectors.append(made.last_hidden_state[0].mean(0).numpy())
    got = np.array([datum["embedding"] for datum in found["data"]])
    assert got == pytest.approx(np.array(vectors), abs=1e-5)


def test_params_of_openai_and_of_sentence_transformers(saved, wanted):
    loaded = mlflow_safeflavor.load_model(saved)
    short = wanted(truncate_dim=5, normalize_embeddings=True)
    require_answer(loaded.predict(TEXTS, {"dimensions": 5, "user": "me"}), short, sum(TOKENS))
    assert np.linalg.norm(short, axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    require_answer(loaded.predict(TEXTS, {"model": "b"}), wanted(), sum(TOKENS), "b")
    asked = loaded.predict(["a"], {"prompt_name": "query"})
    require_answer(asked, wanted(["find the a"]), 5)
    found = loaded.predict(TEXTS, {"encoding_format": "base64"})
    decoded = [
        np.frombuffer(base64.b64decode(datum["embedding"]), "<f4").tolist()
        for datum in found["data"]
    ]
    assert decoded == [datum["embedding"] for datum in loaded.predict(TEXTS)["data"]]
    for params, named in (
        ({"dimensions": 33}, r"'dimensions'[\s\S]*at most 32[\s\S]*33"),
        ({"dimensions": -1}, "'dimensions'"),
        ({"encoding_format": "hex"}, r"'encoding_format'[\s\S]*float \| base64"),
        ({"prompt_name": "passage"}, r"'prompt_name'[\s\S]*query"),
    ):
        with pytest.raises(InputError, match=named):
            loaded.predict(TEXTS, params)


@pytest.mark.parametrize("data", [{"input": [5, 6]}, {"input": [[5, 6], [7]]}, [{"input": [5]}]])
def test_tokens_of_another_tokenizer_are_refused(saved, data):
    loaded = mlflow_safeflavor.load_model(saved)
    with pytest.raises(InputError, match=r"row 0[\s\S]*check_embedding_ctx_length=False"):
        loaded.predict(data)
    for bad in ({"input": []}, {"input": [None]}, {"input": [3.5]}, {"text": ["a"], "input": "a"}):
        with pytest.raises(InputError, match=r"input|rows"):
            loaded.predict(bad)


def test_schema_and_metadata_are_those_of_mlflow(saved):
    from mlflow.types import llm

    model = mlflow.models.Model.load(str(saved))
    assert model.metadata == {"task": TASK}
    assert model.signature.inputs == llm.EMBEDDING_MODEL_INPUT_SCHEMA
    ours = {spec.name: spec.type for spec in model.signature.outputs.inputs}
    theirs = {spec.name: spec.type for spec in llm.EMBEDDING_MODEL_OUTPUT_SCHEMA.inputs}
    assert ours.pop("model") is mlflow.types.DataType.string
    assert ours == theirs


def test_sentence_transformers_is_asked_by_mlflows_own_words(tmp_path, tiny_tokenizer, saved):
    """The same answer as ``mlflow.sentence_transformers`` gives, to the form of its parts."""
    pytest.importorskip("sentence_transformers", minversion="6")
    from mlflow.transformers.llm_inference_utils import (
        postprocess_output_for_llm_v1_embedding_task as peers,
    )

    found = mlflow_safeflavor.load_model(saved).predict({"input": TEXTS[:2]})
    vectors = [datum["embedding"] for datum in found["data"]]
    wanted = peers(TEXTS[:2], vectors, tiny_tokenizer)
    assert found == {**wanted, "model": "tiny"}


@pytest.mark.serve
def test_clients_of_openai_read_what_a_server_answers(serve, saved, wanted, tmp_path):
    with serve(saved, env={"OMP_NUM_THREADS": "1"}) as server:
        answer = server.invoke({"input": TEXTS, "model": "mine", "encoding_format": "float"})
        require_answer(answer.json(), wanted(), sum(TOKENS), "mine")
        require_answer(server.invoke({"input": "a"}).json(), wanted(["a"]), 3)
        answer = server.invoke({"input": "a", "dimensions": 4, "nobody": "knows"})
        require_answer(answer.json(), wanted(["a"], truncate_dim=4, normalize_embeddings=True), 3)
        (packed,) = server.invoke({"input": "a", "precision": "ubinary"}).json()["data"]
        assert packed["embedding"] == wanted(["a"], precision="ubinary")[0]
        assert all(isinstance(number, int) for number in packed["embedding"])
        rows = server.invoke({"dataframe_records": [{"input": text} for text in TEXTS]})
        require_answer(rows.json()["predictions"], wanted(), sum(TOKENS))
        for bad in ({"input": [[5, 6]]}, {"input": "a", "dimensions": 40}, {"input": []}):
            refused = server.invoke(bad)
            assert refused.status == 400, refused.text
        report = mlflow_safeflavor.verify_model(
            saved, endpoint=server.url, rows=rows_file(tmp_path)
        )
        assert report.bit_identical
        require_clients(server.url, wanted)


def rows_file(folder):
    path = folder / "rows.csv"
    pd.DataFrame({"input": TEXTS}).to_csv(path, index=False)
    return path


def require_clients(url, wanted):
    """What the client libraries return, with a request hook that names MLflow's only path."""
    openai = pytest.importorskip("openai")

    def to_invocations(request):
        request.url = request.url.copy_with(path="/invocations")

    # The library's own: of which httpx it is changes with its releases.
    with openai.DefaultHttpxClient(event_hooks={"request": [to_invocations]}) as http_client:
        address = {"base_url": url, "api_key": "none", "http_client": http_client}
        client = openai.OpenAI(**address)
        asked = client.embeddings.create(input=TEXTS, model="mine")
        require_vectors([datum.embedding for datum in asked.data], wanted())
        assert (asked.model, asked.usage.total_tokens) == ("mine", sum(TOKENS))
        asked = client.embeddings.create(input="a", model="mine", dimensions=4)
        assert len(asked.data[0].embedding) == 4

        langchain = pytest.importorskip("langchain_openai")
        # without check_embedding_ctx_length it sends the numbers of OpenAI's own tokens
        embedder = langchain.OpenAIEmbeddings(
            model="mine", check_embedding_ctx_length=False, **address
        )
        require_vectors(embedder.embed_documents(TEXTS), wanted())
        require_vectors([embedder.embed_query("a")], wanted(["a"]))

        llama = pytest.importorskip("llama_index.embeddings.openai_like")
        embedder = llama.OpenAILikeEmbedding(
            model_name="mine", api_base=url, api_key="none", http_client=http_client
        )
        require_vectors(embedder.get_text_embedding_batch(TEXTS), wanted())
        require_vectors([embedder.get_query_embedding("a")], wanted(["a"]))


def require_vectors(found, wanted):
    assert np.array(found) == pytest.approx(np.array(wanted), abs=1e-6)
