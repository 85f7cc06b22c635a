"""Tasks by name, and the task of a model class."""

from __future__ import annotations

from mlflow_safeflavor.errors import StructureError
from mlflow_safeflavor.tasks.audio_classification import AudioClassification
from mlflow_safeflavor.tasks.base import Task
from mlflow_safeflavor.tasks.custom import Custom
from mlflow_safeflavor.tasks.feature_extraction import FeatureExtraction
from mlflow_safeflavor.tasks.fill_mask import FillMask
from mlflow_safeflavor.tasks.image_classification import ImageClassification
from mlflow_safeflavor.tasks.image_feature_extraction import ImageFeatureExtraction
from mlflow_safeflavor.tasks.llm_embeddings import LlmEmbeddings
from mlflow_safeflavor.tasks.llm_generation import LlmChat, LlmCompletions
from mlflow_safeflavor.tasks.object_detection import ObjectDetection
from mlflow_safeflavor.tasks.question_answering import QuestionAnswering
from mlflow_safeflavor.tasks.raw import Raw
from mlflow_safeflavor.tasks.speech_recognition import SpeechRecognition
from mlflow_safeflavor.tasks.text2text_generation import Text2TextGeneration, specific_task
from mlflow_safeflavor.tasks.text_classification import TextClassification
from mlflow_safeflavor.tasks.text_generation import TextGeneration
from mlflow_safeflavor.tasks.text_ranking import TextRanking
from mlflow_safeflavor.tasks.token_classification import TokenClassification
from mlflow_safeflavor.tasks.zero_shot_classification import ZeroShotClassification
from mlflow_safeflavor.tasks.zero_shot_image_classification import ZeroShotImageClassification

__all__ = ["TASKS", "Task", "infer_task", "task_class"]

TASKS: dict[str, type[Task]] = {
    cls.name: cls
    for cls in (
        AudioClassification,
        Custom,
        FeatureExtraction,
        FillMask,
        ImageClassification,
        ImageFeatureExtraction,
        LlmChat,
        LlmCompletions,
        LlmEmbeddings,
        ObjectDetection,
        QuestionAnswering,
        Raw,
        SpeechRecognition,
        Text2TextGeneration,
        TextClassification,
        TextGeneration,
        TextRanking,
        TokenClassification,
        ZeroShotClassification,
        ZeroShotImageClassification,
    )
}

# Other names that transformers' pipelines have for a task.
_ALIASES = {"ner": "token-classification", "sentiment-analysis": "text-classification"}


def task_class(name: str) -> type[Task]:
    """The task of that name or alias; its ``name`` is recorded.

    Raises:
        StructureError: There is none.
    """
    name = _ALIASES.get(name, name)
    # "translation_en_to_de" and its like are names of one task, with settings of the model's.
    if specific := specific_task(name):
        return specific
    if name not in TASKS:
        raise StructureError("Unknown task", where=name, wanted=" | ".join(sorted(TASKS)))
    return TASKS[name]


def infer_task(class_name: str, main_input: str = "input_ids") -> str:
    """The task of a model class, from its name (``BertForSequenceClassification`` …).

    Args:
        class_name: Name of the class.
        main_input: Its ``main_input_name``; tells Wav2Vec2ForSequenceClassification, which listens,
            from BERT's, and ViTModel, which sees, from BertModel.

    Raises:
        StructureError: The class is made for something else.
    """
    for name, cls in TASKS.items():
        # Names of classes do not tell a classifier of sounds from one of texts.
        if cls.serves(class_name) and cls.hears == (
            main_input in ("input_values", "input_features")
        ):
            # Nor does "…Model" tell what sees from what reads; no text is an array of pixels.
            sees = cls is FeatureExtraction and main_input == "pixel_values"
            return ImageFeatureExtraction.name if sees else name
    raise StructureError(
        "The task cannot be told from the model class",
        where=class_name,
        wanted=" | ".join(sorted(TASKS)),
        hint="say it: save_model(..., task=...)",
    )
