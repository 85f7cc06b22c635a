"""Rows from every shape users hold data in; every refusal names row and column."""

import datetime

import numpy as np
import pandas as pd
import pytest
from mlflow.models import ModelSignature
from mlflow.models.utils import _enforce_schema
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.inputs.rows import rows_of
from mlflow_safeflavor.tasks.inputs.tables import unfold_columns
from mlflow_safeflavor.tasks.inputs.texts import require_texts

ONE = {"text": "review"}
TWO = {"text": "buggy_code", "text_pair": "fixed_code"}

WANTED_ONE = [{"text": "a"}, {"text": ""}, {"text": "ü😀"}]
TEXTS = ["a", "", "ü😀"]

WANTED_TWO = [{"text": "a", "text_pair": "x"}, {"text": "b", "text_pair": "y"}]
COLUMNS = {"buggy_code": ["a", "b"], "fixed_code": ["x", "y"]}


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame({"review": TEXTS}),
        pd.DataFrame({"review": TEXTS}, dtype=object),
        pd.DataFrame({"review": TEXTS}, dtype="string"),
        pd.DataFrame({"review": pd.Categorical(TEXTS)}),
        pd.DataFrame({"review": TEXTS}, index=[7, 7, 1]),
        pd.Series(TEXTS),
        pd.Series(TEXTS, name="review", index=["z", "y", "x"]),
        pd.Series(TEXTS, name="another"),
        TEXTS,
        tuple(TEXTS),
        [{"review": text} for text in TEXTS],
        [(text,) for text in TEXTS],
        {"review": TEXTS},
        {"review": tuple(TEXTS)},
        {"review": pd.Series(TEXTS, index=[3, 2, 1])},
        {"review": np.array(TEXTS)},
        {"review": np.array(TEXTS, dtype=object)},
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        np.array(TEXTS).reshape(3, 1),
    ],
    ids=lambda data: type(data).__name__,
)
def test_one_column_in_every_shape(data):
    assert rows_of(data, ONE) == WANTED_ONE
    require_texts(rows_of(data, ONE), ONE)


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame(COLUMNS),
        pd.DataFrame(COLUMNS)[["fixed_code", "buggy_code"]],
        COLUMNS,
        dict(reversed(COLUMNS.items())),
        {name: np.array(values) for name, values in COLUMNS.items()},
        [{"buggy_code": "a", "fixed_code": "x"}, {"fixed_code": "y", "buggy_code": "b"}],
        [("a", "x"), ("b", "y")],
        [["a", "x"], ["b", "y"]],
        np.array([["a", "x"], ["b", "y"]]),
        np.array([["a", "x"], ["b", "y"]], dtype=object),
    ],
    ids=lambda data: type(data).__name__,
)
def test_two_columns_in_every_shape(data):
    assert rows_of(data, TWO) == WANTED_TWO
    require_texts(rows_of(data, TWO), TWO)


@pytest.mark.parametrize(
    "data", ["one", {"review": "one"}, {"review": np.array("one")}, np.array("one")]
)
def test_a_single_value_is_one_row(data):
    assert rows_of(data, ONE) == [{"text": "one"}]


def test_a_dict_of_scalars_is_one_row_of_several_columns():
    assert rows_of({"fixed_code": "x", "buggy_code": "a"}, TWO) == [{"text": "a", "text_pair": "x"}]


def test_a_field_that_is_not_required_may_be_absent_but_not_missing():
    assert rows_of({"buggy_code": ["a"]}, TWO, ["text"]) == [{"text": "a"}]
    with pytest.raises(InputError, match=r"row 0, column 'fixed_code'"):
        rows_of({"buggy_code": ["a"], "fixed_code": [None]}, TWO, ["text"])


MISSING = [None, float("nan"), np.nan, np.float32("nan"), pd.NA, pd.NaT]


@pytest.mark.parametrize("value", MISSING, ids=repr)
@pytest.mark.parametrize(
    "shape",
    [
        lambda v: pd.DataFrame({"review": ["a", v, "b"]}, dtype=object),
        lambda v: pd.Series(["a", v], dtype=object),
        lambda v: ["a", v],
        lambda v: [{"review": "a"}, {"review": v}],
        lambda v: {"review": ["a", v]},
        lambda v: np.array(["a", v], dtype=object),
    ],
    ids=["frame", "series", "list", "dicts", "dict", "array"],
)
def test_a_missing_value_names_row_and_column(shape, value):
    with pytest.raises(
        InputError, match=r"(missing|not a text)[\s\S]*where: row 1, column 'review'"
    ):
        require_texts(rows_of(shape(value), ONE), ONE)


@pytest.mark.parametrize("value", MISSING[:2] + MISSING[4:5], ids=repr)
def test_a_missing_value_of_pandas_own_string_column(value):
    for dtype in (None, "string"):
        with pytest.raises(InputError, match=r"value is missing[\s\S]*row 2, column 'review'"):
            rows_of(pd.DataFrame({"review": pd.Series(["a", "b", value], dtype=dtype)}), ONE)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (5, "int 5"),
        (2.5, "float 2.5"),
        (True, "bool True"),
        (b"a", "bytes b'a'"),
        (["a"], r"list \['a'\]"),
        ({"a": 1}, "dict"),
        (datetime.date(2020, 1, 1), "date"),
    ],
)
def test_a_value_that_is_no_text_names_row_and_column(value, found):
    for data, column in (
        (["a", value], 1),
        (pd.DataFrame({"review": ["a", "b", value]}, dtype=object), 2),
    ):
        with pytest.raises(
            InputError,
            match=rf"not a text[\s\S]*row {column}, column 'review'[\s\S]*found: {found}",
        ):
            require_texts(rows_of(data, ONE), ONE)


def test_a_field_without_column_is_named():
    with pytest.raises(InputError, match=r"row 0, column 'fixed_code'[\s\S]*found: no such column"):
        require_texts([{"text": "a"}], TWO)


@pytest.mark.parametrize(
    "data",
    [
        [],
        (),
        {"review": []},
        pd.DataFrame({"review": []}),
        pd.Series([], dtype=object),
        np.array([]),
    ],
)
def test_no_rows(data):
    with pytest.raises(InputError, match="no rows"):
        rows_of(data, ONE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            pd.DataFrame({"text": ["a"]}),
            r"column is missing[\s\S]*where: column 'review'[\s\S]*found: only \['text'\]",
        ),
        ({"text": "a"}, r"column is missing[\s\S]*column 'review'[\s\S]*input_columns"),
        ({}, r"column is missing[\s\S]*no columns"),
        (
            [{"review": "a"}, {"text": "a"}],
            r"column is missing[\s\S]*where: row 1, column 'review'",
        ),
        (
            pd.DataFrame({"review": ["a"], "id": [1]}),
            r"does not know[\s\S]*column 'id'[\s\S]*data\[\['review'\]\]",
        ),
        ([{"review": "a"}, {"review": "a", "id": 1}], r"does not know[\s\S]*row 1, column 'id'"),
        (pd.DataFrame([["a", "b"]], columns=["review", "review"]), r"same name[\s\S]*\['review'\]"),
        ([{"review": "a"}, "b"], r"different shapes[\s\S]*row 1, column 'review'[\s\S]*a dict"),
        ([("a",), ("a", "b")], r"wrong number of values[\s\S]*row 1, column 'review'"),
        (
            np.array([["a", "b"]]),
            r"wrong number of values[\s\S]*row 0, column 'review'[\s\S]*found: 2",
        ),
        (np.zeros((1, 1, 1)), r"too many dimensions[\s\S]*shape \(1, 1, 1\)"),
        (None, r"cannot be read[\s\S]*column 'review'[\s\S]*missing value"),
        (5, r"cannot be read[\s\S]*int 5"),
        (b"abc", r"cannot be read[\s\S]*bytes"),
        ({"a", "b"}, r"cannot be read[\s\S]*set"),
        (iter(["a"]), r"cannot be read[\s\S]*iterator"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_shapes_that_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        rows_of(data, ONE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"buggy_code": ["a", "b"], "fixed_code": ["x"]},
            r"different lengths[\s\S]*row 1, columns 'buggy_code' and 'fixed_code'[\s\S]*2, "
            r"'fixed_code': 1",
        ),
        (
            {"buggy_code": ["a"], "fixed_code": "x"},
            r"single values[\s\S]*'buggy_code': list, 'fixed_code': str",
        ),
        (pd.DataFrame({"buggy_code": ["a"]}), r"column is missing[\s\S]*column 'fixed_code'"),
        ("a", r"several columns[\s\S]*row 0, columns 'buggy_code' and 'fixed_code'"),
        (["a", "b"], r"several columns[\s\S]*row 0, columns"),
        (pd.Series(["a", "b"]), r"Series of single values[\s\S]*row 0, columns"),
        (np.array(["a", "b"]), r"1-D array of single values[\s\S]*row 0, columns"),
        (
            [("a", "x"), ("b",)],
            r"wrong number[\s\S]*row 1, columns[\s\S]*in this order: columns 'buggy_code'",
        ),
        ([["a", "x"], "b"], r"different shapes[\s\S]*row 1, columns"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_shapes_that_are_refused_for_two_columns(data, message):
    with pytest.raises(InputError, match=message):
        rows_of(data, TWO)


def test_a_huge_value_does_not_fill_the_message():
    with pytest.raises(InputError) as caught:
        require_texts(rows_of([["x" * 1_000_000]], ONE), ONE)
    assert len(str(caught.value)) < 1000


# What MLflow does to data before a pyfunc model sees it.


@pytest.fixture(scope="module")
def schema():
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, name) for name in TWO.values()])
    ).inputs


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame(COLUMNS),
        pd.DataFrame({**COLUMNS, "extra": [1, 2]}),
        COLUMNS,
        {name: np.array(values) for name, values in COLUMNS.items()},
        {name: pd.Series(values) for name, values in COLUMNS.items()},
        [{"buggy_code": "a", "fixed_code": "x"}, {"buggy_code": "b", "fixed_code": "y"}],
    ],
    ids=["frame", "extra", "dict of lists", "dict of arrays", "dict of series", "dicts"],
)
def test_rows_behind_mlflows_schema_enforcement(schema, data):
    assert rows_of(unfold_columns(_enforce_schema(data, schema)), TWO) == WANTED_TWO


def test_a_dict_of_lists_of_one_text_each_behind_mlflow(schema):
    folded = _enforce_schema({"buggy_code": ["a"], "fixed_code": ["x"]}, schema)
    assert folded.iloc[0, 0] == ["a"]  # else unfold_columns is no longer needed
    assert rows_of(unfold_columns(folded), TWO) == WANTED_TWO[:1]


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame(COLUMNS),
        pd.DataFrame({"review": [["a"], ["b"]]}),
        pd.DataFrame(),
        ["a"],
        {"a": ["b"]},
    ],
)
def test_anything_else_is_not_unfolded(data):
    assert unfold_columns(data) is data
