"""The tasks by name; a task's module is imported when a recipe asks for it."""

from importlib import import_module
from typing import Any

from veneer.core.errors import AdapterError, nearest
from veneer.train.task import Task

TASKS = {
    "causal-lm": "veneer.train.language.causal_lm:CausalLM",
    "text-to-text": "veneer.train.language.text_to_text:TextToText",
    "preference": "veneer.train.language.preference:Preference",
    "sequence-classification": "veneer.train.language.sequence_classification:SequenceClassification",
    "token-classification": "veneer.train.language.token_classification:TokenClassification",
    "question-answering": "veneer.train.language.question_answering:QuestionAnswering",
    "image-classification": "veneer.train.vision.image_classification:ImageClassification",
    "semantic-segmentation": "veneer.train.vision.semantic_segmentation:SemanticSegmentation",
    "text-to-image": "veneer.train.diffusion.task:TextToImage",
}


def task_named(name: Any) -> type[Task]:
    """The task's class. Raises `AdapterError` when there is none of that name, or a package is missing."""
    if not isinstance(name, str) or name not in TASKS:
        raise AdapterError(f"task {name!r} is not one of {', '.join(TASKS)}{nearest(name, TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ImportError as error:
        more = ",diffusion" * ("diffusion" in module)
        raise AdapterError(f"the task {name} needs: pip install 'veneer[train{more}]' ({error})") from error
