"""Fine-tune an encoder on a task, and evaluate what came out."""

from deltafl.finetuning.evaluation import Evaluation, evaluate, make_head
from deltafl.finetuning.recipe import FinetuneRecipe
from deltafl.finetuning.run import TRAINING_JSON, Finetuned, finetune
from deltafl.finetuning.state import state_path

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
