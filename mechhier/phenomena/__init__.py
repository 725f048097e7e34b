"""What is measured: one file or folder a phenomenon, one call each, on any hooked model."""

from mechhier.phenomena.function_vectors import function_vectors
from mechhier.phenomena.hydra import hydra
from mechhier.phenomena.induction import heads, induction
from mechhier.phenomena.published import published
from mechhier.phenomena.registry import PHENOMENA, check_options
from mechhier.phenomena.tasks import Prompts, Task, built_in_tasks, grammar_tasks, word_tasks

__all__ = [
    "PHENOMENA",
    "Prompts",
    "Task",
    "built_in_tasks",
    "check_options",
    "function_vectors",
    "grammar_tasks",
    "heads",
    "hydra",
    "induction",
    "published",
    "word_tasks",
]
