"""Train a model on a task, validated after each epoch or once, and evaluate what came out."""

from deltafl.training.centralized import centralize
from deltafl.training.evaluation import Evaluation, EvaluationRecipe, evaluate
from deltafl.training.finetune import TRAINING_JSON, Finetuned, finetune
from deltafl.training.recipe import CentralizedRecipe, TrainingRecipe

__all__ = [
    "TRAINING_JSON",
    "CentralizedRecipe",
    "Evaluation",
    "EvaluationRecipe",
    "Finetuned",
    "TrainingRecipe",
    "centralize",
    "evaluate",
    "finetune",
]
