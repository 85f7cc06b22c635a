"""The service: does this change fix a bug?

    python serve.py --model-uri models:/codebuggy@champion   # the model in this process
    python serve.py --endpoint http://127.0.0.1:5000         # a running MLflow scoring server

``POST /predict`` takes ``{"buggy_code": "...", "fixed_code": "..."}``; ``GET /`` is a page to paste
two snippets into, ``GET /health`` says whether there is a model to ask. A model that holds a pickle
is loaded only with MLflow's own ``MLFLOW_ALLOW_PICKLE_DESERIALIZATION=true``, as under ``mlflow
models serve``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import click
import pandas as pd
import requests
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ConfigDict, StringConstraints

PAGE = Path(__file__).with_name("page.html")
# The page holds all it needs, and may ask nobody but this service.
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src "
    "'self'; img-src data:"
)

Code = Annotated[
    str, StringConstraints(strict=True, min_length=1, max_length=20_000, pattern=r"\S")
]


class Change(BaseModel):
    """A piece of code before and after a change."""

    model_config = ConfigDict(extra="forbid")
    buggy_code: Code
    fixed_code: Code


class Verdict(BaseModel):
    """What the model says, and how sure it is: a probability from 0.5 to 1."""

    fixes_bug: bool
    label: str
    score: float


class Unavailable(Exception):
    """There is no model that could be asked; says why."""


class Predictor(Protocol):
    """Whoever knows the answer."""

    def predict(self, row: Mapping[str, str]) -> dict[str, Any]:
        """``label`` and ``score`` of a row.

        Raises ``MlflowException`` for a bad row, ``Unavailable`` for no answer.
        """
        ...

    def require_ready(self) -> None:
        """Raises ``Unavailable`` if ``predict`` would."""
        ...


class Loaded:
    """A model in this process, by the same path that ``mlflow models serve`` takes."""

    def __init__(self, model_uri: str) -> None:
        import mlflow

        self.model = mlflow.pyfunc.load_model(model_uri)

    def predict(self, row: Mapping[str, str]) -> dict[str, Any]:
        answer: dict[str, Any] = (
            pd.DataFrame(self.model.predict(pd.DataFrame([row]))).iloc[0].to_dict()
        )
        return answer

    def require_ready(self) -> None:
        """It was loaded before anybody could ask."""


class Remote:
    """A running MLflow scoring server."""

    def __init__(self, endpoint: str, timeout: float = 60) -> None:
        self.endpoint, self.timeout = endpoint.rstrip("/"), timeout

    def predict(self, row: Mapping[str, str]) -> dict[str, Any]:
        response = self._ask("POST", "/invocations", json={"dataframe_records": [row]})
        if response.status_code == 400:
            raise MlflowException(str(response.json().get("message", "the model refused the row")))
        if not response.ok:
            raise Unavailable(f"{self.endpoint} answers {response.status_code}")
        answer: dict[str, Any] = response.json()["predictions"][0]
        return answer

    def require_ready(self) -> None:
        response = self._ask("GET", "/ping")
        if not response.ok:
            raise Unavailable(f"{self.endpoint}/ping answers {response.status_code}")

    def _ask(self, method: str, path: str, **options: Any) -> requests.Response:
        try:
            return requests.request(method, self.endpoint + path, timeout=self.timeout, **options)
        except requests.RequestException as error:
            raise Unavailable(
                f"{self.endpoint} cannot be reached ({type(error).__name__})"
            ) from None


def create_app(predictor: Predictor) -> FastAPI:
    """The service around a model.

    Every error is ``{"error": "…"}`` in one sentence, without a traceback.
    """
    # FastAPI's own pages load from elsewhere
    app = FastAPI(title="CodeBuggy", docs_url=None, redoc_url=None)
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": POLICY})

    @app.get("/health")
    def health() -> dict[str, str]:
        predictor.require_ready()
        return {"status": "ok"}

    @app.post("/predict")
    def predict(change: Change) -> Verdict:
        answer = predictor.predict(change.model_dump())
        return Verdict(
            fixes_bug=answer["label"] == "fix", label=answer["label"], score=answer["score"]
        )

    @app.exception_handler(RequestValidationError)
    def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        return _error(
            422, "; ".join(_where(found["loc"]) + found["msg"] for found in error.errors())
        )

    @app.exception_handler(MlflowException)
    def refuse_row(request: Request, error: MlflowException) -> JSONResponse:
        return _error(error.get_http_status_code(), error.message)

    @app.exception_handler(Unavailable)
    def apologise(request: Request, error: Unavailable) -> JSONResponse:
        return _error(503, str(error))

    return app


def _where(place: tuple[int | str, ...]) -> str:
    """The field that is wrong; for text that is no JSON there is only a position."""
    fields = [part for part in place if isinstance(part, str) and part != "body"]
    return f"{fields[0]}: " if fields else ""


def _error(status: int, text: str) -> JSONResponse:
    # A lone half of a character, which JSON can spell, cannot be sent back as UTF-8.
    return JSONResponse({"error": text.encode(errors="replace").decode()}, status_code=status)


@click.command()
@click.option("--model-uri", envvar="CODEBUGGY_MODEL_URI", help="Model to load into this process.")
@click.option(
    "--endpoint", envvar="CODEBUGGY_ENDPOINT", help="Address of a running MLflow scoring server."
)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, 65535))
def main(model_uri: str | None, endpoint: str | None, host: str, port: int) -> None:
    """Serve a page and POST /predict."""
    if bool(model_uri) == bool(endpoint):
        raise click.UsageError(
            "say either --model-uri or --endpoint (CODEBUGGY_MODEL_URI, CODEBUGGY_ENDPOINT)"
        )
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all that a model needs is in it
    try:
        predictor = Remote(endpoint) if endpoint else Loaded(str(model_uri))
    except MlflowException as error:
        raise click.ClickException(error.message) from None
    uvicorn.run(create_app(predictor), host=host, port=port)


if __name__ == "__main__":
    main()
