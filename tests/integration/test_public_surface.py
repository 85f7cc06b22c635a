import mlflow_safeflavor


def test_all_is_sorted():
    assert list(mlflow_safeflavor.__all__) == sorted(mlflow_safeflavor.__all__)


def test_every_name_exists_and_says_what_it_is():
    for name in mlflow_safeflavor.__all__:
        value = getattr(mlflow_safeflavor, name)
        assert isinstance(value, str) or value.__doc__, name
    assert set(mlflow_safeflavor.__all__) <= set(dir(mlflow_safeflavor))
