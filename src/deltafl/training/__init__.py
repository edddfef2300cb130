"""Fine-tune an encoder on a task, and evaluate what came out."""

from deltafl.training.evaluation import Evaluation, evaluate, make_head
from deltafl.training.finetune import TRAINING_JSON, Finetuned, finetune
from deltafl.training.recipe import FinetuneRecipe
from deltafl.training.state import state_path

__all__ = [
    "TRAINING_JSON",
    "Evaluation",
    "FinetuneRecipe",
    "Finetuned",
    "evaluate",
    "finetune",
    "make_head",
    "state_path",
]
