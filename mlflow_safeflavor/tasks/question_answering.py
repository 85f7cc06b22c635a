"""A question and a context → the answer in it, as transformers' question-answering pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlflow.types import ColSpec, DataType, Schema

from mlflow_safeflavor.errors import InputError
from mlflow_safeflavor.tasks.features import Features, RowOutput
from mlflow_safeflavor.tasks.inputs.rows import Row
from mlflow_safeflavor.tasks.inputs.texts import require_texts
from mlflow_safeflavor.tasks.inputs.wording import format_cell
from mlflow_safeflavor.tasks.outputs import pick, require_finite, softmax
from mlflow_safeflavor.tasks.params import Param
from mlflow_safeflavor.tasks.text import TextTask, groups
from mlflow_safeflavor.tasks.text_model import describe_text_model
from mlflow_safeflavor.tasks.windows import count_windows, windows

if TYPE_CHECKING:
    import torch

__all__ = ["QuestionAnswering"]

_TOP_K = Param("top_k", "long", 1, "a whole number of at least 1", allows=lambda value: value >= 1)
_MAX_ANSWER_LEN = Param(
    "max_answer_len", "long", 15, "at least 1 token", allows=lambda value: value >= 1
)
_DOC_STRIDE = Param(
    "doc_stride",
    "long",
    default=0,
    wanted="how many tokens neighbouring windows share, or 0 for half of max_seq_len, at most 128",
    allows=lambda value: value >= 0,
    none_is=0,
)
_MAX_SEQ_LEN = Param(
    "max_seq_len",
    "long",
    default=0,
    wanted="a whole number of tokens, or 0 for as many as the model takes, at most 384",
    allows=lambda value: value >= 0,
    none_is=0,
)
_IMPOSSIBLE = Param("handle_impossible_answer", "boolean", default=False, wanted="true or false")
_ALIGN = Param("align_to_words", "boolean", default=True, wanted="true or false")

_USUAL_LENGTH, _USUAL_STRIDE = 384, 128
# Characters of a context from which on its beginning is tokenised first.
_LONG = 10_000
_LESS = "send less text at once, or lower doc_stride"

_GOLDEN_QUESTIONS = ("Where?", "Who jumps?", "What costs 3 €?")
_GOLDEN_CONTEXTS = (
    "Anna lives in Zürich.",
    "The quick brown fox jumps over the lazy dog while the cat sleeps, and nobody else is there "
    "to see it.",
    "Once upon a time 😀 everything was cheap. Today a café in Zürich takes 3 € for the smallest "
    "cup of tea, and more for anything that has to be cooked. The naïve visitor pays; all others "
    "drink the water of the fountains, which costs nothing, and is better than the tea.",
)


class QuestionAnswering(TextTask):
    """The part of a context that answers a question.

    A long context is read in windows that overlap. Answers: ``answer``, ``score``, and ``start``
    and ``end``, its place in characters of the context. With ``top_k`` other than 1 also
    ``answers``, ``scores``, ``starts`` and ``ends``, lists of the ``top_k`` best, best first; fewer
    where there are not so many.

    Scores of answers that read the same are added up, as transformers 4.57 does, so that a score
    may exceed 1.
    """

    name = "question-answering"
    fields = ("question", "context")
    required = ("question", "context")
    params = (_TOP_K, _MAX_ANSWER_LEN, _DOC_STRIDE, _MAX_SEQ_LEN, _IMPOSSIBLE, _ALIGN)
    answer = Schema(
        [
            ColSpec(DataType.string, "answer"),
            ColSpec(DataType.double, "score"),
            ColSpec(DataType.long, "start"),
            ColSpec(DataType.long, "end"),
        ]
    )

    @classmethod
    def serves(cls, class_name: str) -> bool:
        return class_name.endswith(("ForQuestionAnswering", "ForQuestionAnsweringSimple"))

    @classmethod
    def describe(cls, model: torch.nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
        cls.require_known(options)
        return describe_text_model(model)

    def golden_rows(self) -> list[Row]:
        pairs = zip(_GOLDEN_QUESTIONS, _GOLDEN_CONTEXTS, strict=True)
        return [{"question": question, "context": context} for question, context in pairs]

    def check_params(self, params: Mapping[str, Any] | None) -> dict[str, Any]:
        checked = super().check_params(params)
        self.require_length("max_seq_len", checked["max_seq_len"], texts=2)
        return checked

    @property
    def _context(self) -> int:
        """Number of the context in the pair of texts."""
        # Tokenizers that pad on the left (XLNet) are for models that read the context first.
        return 1 if self.encoder.config["padding_side"] == "right" else 0

    # A row → windows.

    def encode(self, rows: Sequence[Row], params: Mapping[str, Any]) -> Iterator[Features | None]:
        require_texts(rows, self.columns)
        fields = ("question", "context") if self._context == 1 else ("context", "question")
        pieces = 0
        self._require_few(len(rows) - 1, len(rows), len(rows), params)  # each row has one
        for start, some in groups(rows):
            for i, given in enumerate(some, start):
                self._require_short_context(i, given, pieces, len(rows), params)
            first, second = ([row[field] for row in some] for field in fields)
            encoded = self.encoder.encode(first, second, truncation=False, spans=True)
            for i, row in enumerate(encoded, start):
                tokens, room, overlap = self._cuts(i, row, params)
                pieces += count_windows(tokens, room, overlap)
                self._require_few(i, pieces, len(rows), params)
                cut = []
                for window in windows(self.known(row), self._context, room, overlap):
                    cut.append(window)
                    yield None
                yield {"windows": cut}

    def _require_few(self, i: int, pieces: int, rows: int, params: Mapping[str, Any]) -> None:
        """Refuse row ``i`` if the windows so far, or their answers below the best, exceed a cap."""
        where = f"windows up to {format_cell(i)}"
        self.caps.require_pieces(pieces, rows, where=where, instead=_LESS)
        if params["top_k"] > 1:
            length = min(params["max_answer_len"], self._read_at_once(params))
            # An upper bound: each window has at most length · window spans, of length tokens each.
            tokens = pieces * min(params["top_k"], length * self._read_at_once(params)) * length
            where, instead = (
                f"params, 'top_k', {where}",
                "lower top_k or max_answer_len, or send less text at once",
            )
            self.caps.require_answers(tokens, rows, where=where, instead=instead)

    def _require_short_context(
        self, i: int, row: Row, pieces: int, rows: int, params: Mapping[str, Any]
    ) -> None:
        """Refuse row ``i`` by the beginnings of its texts, before a long one is tokenised whole."""
        limit = self._read_at_once(params)
        if self.encoder.exceeds(row["question"], limit):
            raise self._no_room(i, limit, f"more than {limit} tokens")
        if len(row["context"]) > _LONG:
            (question,) = self.encoder.encode([row["question"]], truncation=False, special=False)
            # Beside the question and the special tokens: as in ``_cuts``, without the context.
            room = limit - len(question["input_ids"]) - self.encoder.special_tokens(pair=True)
            if room >= 1:
                overlap = self._overlap(i, room, limit, room, params)
                where = f"windows up to {format_cell(i)}"
                self.require_few_windows(
                    row["context"], pieces, rows, room, overlap, where=where, instead=_LESS
                )

    def _no_room(self, i: int, limit: int, found: str) -> InputError:
        return InputError(
            "A question leaves no room for its context",
            where=format_cell(i, self.columns["question"]),
            wanted=f"fewer tokens: {limit} are read at once",
            found=found,
            hint="shorten the question, or raise max_seq_len if the model takes more",
        )

    def _read_at_once(self, params: Mapping[str, Any]) -> int:
        """Most tokens of a window."""
        return int(params["max_seq_len"] or min(self.limit or _USUAL_LENGTH, _USUAL_LENGTH))

    def _cuts(
        self, i: int, row: Mapping[str, list[Any]], params: Mapping[str, Any]
    ) -> tuple[int, int, int]:
        """Tokens of the context of row ``i``, of a window of it, and shared by neighbours."""
        limit = self._read_at_once(params)
        context = row["sequence_ids"].count(self._context)
        for field, tokens in (
            ("question", row["sequence_ids"].count(1 - self._context)),
            ("context", context),
        ):
            if not tokens:
                raise InputError(
                    "A text has no tokens, so there is nothing to ask or to find",
                    where=format_cell(i, self.columns[field]),
                    wanted="at least one token",
                    found="0 tokens",
                )
        room = limit - (len(row["input_ids"]) - context)
        if room < 1:
            raise self._no_room(i, limit, f"{limit - room} tokens with the special ones")
        return context, room, self._overlap(i, room, limit, context, params)

    def _overlap(
        self, i: int, room: int, limit: int, context: int, params: Mapping[str, Any]
    ) -> int:
        given: int = params["doc_stride"]
        # The next window would not begin behind the last one.
        if given >= room and context > room:
            raise InputError(
                "Windows would share all they have",
                where=f"params, 'doc_stride', for {format_cell(i, self.columns['question'])}",
                wanted=f"less than the {room} tokens of context that fit beside the question",
                found=given,
            )
        usual = min(limit // 2, _USUAL_STRIDE)
        # Beside a long question the usual overlap may be more than a whole window; transformers'
        # pipeline then fails.
        return min(given, room - 1) if given else usual if usual < room else room // 2

    def pieces(self, features: Features) -> Sequence[Features]:
        pieces: Sequence[Features] = features["windows"]
        return pieces

    # Logits of windows → answers.

    def read(self, outputs: Mapping[str, np.ndarray], mask: np.ndarray) -> list[RowOutput]:
        start = pick(outputs, "start_logits", mask.shape)
        end = pick(outputs, "end_logits", mask.shape, position=1)
        return [
            {"start_logits": starts[real], "end_logits": ends[real]}
            for starts, ends, real in zip(start, end, mask, strict=True)
        ]

    def join(self, outputs: Sequence[RowOutput]) -> RowOutput:
        return {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}

    def decode(
        self,
        rows: Sequence[Row],
        features: Sequence[Features],
        outputs: Sequence[RowOutput],
        params: Mapping[str, Any],
        *,
        first: int = 0,
    ) -> Iterator[dict[str, Any] | None]:
        for i, (row, encoded, output) in enumerate(
            zip(rows, features, outputs, strict=True), first
        ):
            require_finite([np.concatenate([*output.values()])], i)
            found: list[dict[str, Any]] = []
            for answers in self._found(row["context"], self.pieces(encoded), output, params):
                found = answers
                yield None
            yield _answer(found, params["top_k"])

    def _found(
        self, text: str, pieces: Sequence[Features], output: RowOutput, params: Mapping[str, Any]
    ) -> Iterator[list[dict[str, Any]]]:
        """Answers of all windows, best first, last of all; an empty list after each window."""
        # Outputs of all windows lie behind each other: split again where each ends.
        cuts = np.cumsum([self.cost(piece) for piece in pieces])[:-1]
        starts, ends = (np.split(output[name], cuts) for name in ("start_logits", "end_logits"))
        found: dict[str, dict[str, Any]] = {}
        impossible = []
        for piece, start, end in zip(pieces, starts, ends, strict=True):
            possible, null = self._spans(piece, start, end, params)
            impossible.append(null)
            for first, last, score in possible:
                a, b = _characters(
                    piece, first, last, self._context, align=params["align_to_words"]
                )
                answer = {"answer": text[a:b], "score": 0.0, "start": a, "end": b}
                # Equal texts at any place, and in two windows, are one answer.
                found.setdefault(text[a:b].lower(), answer)["score"] += score
            yield []
        answers = [*found.values()]
        if params["handle_impossible_answer"]:
            # No answer at all only if no window has one, as in transformers.
            answers.append({"answer": "", "score": min(impossible), "start": 0, "end": 0})
        yield sorted(answers, key=lambda answer: -answer["score"])

    def _spans(
        self, piece: Features, start: np.ndarray, end: np.ndarray, params: Mapping[str, Any]
    ) -> tuple[list[tuple[int, int, float]], float]:
        """Best spans of one window (first and last token, score), and the score of no answer."""
        text = np.asarray(piece["sequence_ids"])  # (tokens,): -1 special, 0 and 1 the two texts
        context = text == self._context
        # Models trained with unanswerable questions put "none" at this token, so it takes its part
        # of the probability.
        cls = (text < 0) & (np.asarray(piece["input_ids"]) == self.encoder.config["cls_token_id"])
        # The question and other special tokens have no part: softmax over the rest alone.
        read = np.flatnonzero(context | cls)
        starts, ends = np.zeros_like(start), np.zeros_like(end)
        starts[read], ends[read] = softmax(start[read]), softmax(end[read])
        null = float((starts * ends)[cls].max(initial=0))  # 0 where the tokenizer has no such token
        scores = np.outer(starts[context], ends[context])  # (first, last) of each span
        # The upper triangle: a span ends where it begins or later, and is not too long.
        allowed = np.triu(np.tril(np.ones_like(scores, dtype=bool), params["max_answer_len"] - 1))
        first, last = np.nonzero(allowed)
        # More than asked for, as several spans may turn out to be of the same words.
        kept = params["top_k"] * 2 + 10 if params["align_to_words"] else params["top_k"]
        best = _best(scores[first, last], kept)
        places = np.flatnonzero(context)
        return [
            (int(places[first[i]]), int(places[last[i]]), float(scores[first[i], last[i]]))
            for i in best
        ], null


def _best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` best scores, best first, of equal ones the first."""
    # By partition: a window of 384 tokens has some 5,600 spans of up to 15; few are sorted.
    least = (
        np.partition(scores, len(scores) - count)[len(scores) - count]
        if len(scores) > count
        else -np.inf
    )
    near = np.flatnonzero(scores >= least)
    best: np.ndarray = near[np.argsort(-scores[near], kind="stable")][:count]
    return best


def _characters(
    piece: Features, first: int, last: int, context: int, *, align: bool
) -> tuple[int, int]:
    """Start and end of a span in characters; with ``align`` those of its first and last word."""
    words, texts = piece["word_ids"], piece["sequence_ids"]
    if align and words[first] >= 0 and words[last] >= 0:
        while first > 0 and (texts[first - 1], words[first - 1]) == (context, words[first]):
            first -= 1
        while last + 1 < len(words) and (texts[last + 1], words[last + 1]) == (
            context,
            words[last],
        ):
            last += 1
    return piece["offsets"][first][0], piece["offsets"][last][1]


def _answer(found: Sequence[dict[str, Any]], top_k: int) -> dict[str, Any]:
    if top_k == 1:
        return found[0]
    return {
        **found[0],
        **{f"{name}s": [answer[name] for answer in found[:top_k]] for name in found[0]},
    }
