"""Train a model on a task, validated after each epoch or once, and evaluate what came out."""

from deltafl.training.evaluation import Evaluation, EvaluationRecipe, evaluate
from deltafl.training.finetune import TRAINING_JSON, Finetuned, centralize, finetune
from deltafl.training.recipe import CentralizedRecipe, TrainingRecipe
from deltafl.training.record import FinishedRun

__all__ = [
    "TRAINING_JSON",
    "CentralizedRecipe",
    "Evaluation",
    "EvaluationRecipe",
    "Finetuned",
    "FinishedRun",
    "TrainingRecipe",
    "centralize",
    "evaluate",
    "finetune",
]
