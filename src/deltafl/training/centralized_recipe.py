"""How to train centrally: one frozen recipe, checked where it is used."""

from dataclasses import asdict, dataclass

from deltafl.errors import did_you_mean
from deltafl.federated.recipe import AUGMENTATIONS
from deltafl.training.recipe import FinetuneRecipe


@dataclass(frozen=True)
class CentralizedRecipe:
    """SGD with momentum on all training samples; the names are those of a federated recipe.

    lr_schedule: of `training.lr_at`, over all steps, after `warmup` steps. augment: none, flip or crop_flip, of
    training images only. head: ridge, probe, linear, zero-shot (with prompts from the file
    `templates`) or a file; it is frozen unless train_head. patience: epochs
    without a gain on validation after which the run ends; None: never.
    """

    epochs: int = 50
    lr: float = 0.001
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    batch_size: int = 64
    lr_schedule: str = "cosine"
    warmup: int = 0
    augment: str = "none"
    grad_clip: float | None = None
    label_smoothing: float = 0.0
    head: str = "ridge"
    few_shot: int | None = None
    templates: str | None = None
    train_head: bool = False
    patience: int | None = None
    mixed_precision: str = "no"
    seed: int = 0

    def finetuning(self) -> FinetuneRecipe:
        """The same training as `finetune` knows it."""
        held = asdict(self)
        other = ("nesterov", "augment", "patience", "lr_schedule")
        return FinetuneRecipe(
            **{k: v for k, v in held.items() if k not in other},
            schedule=self.lr_schedule,
            optimizer="sgd",
        )

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        rules = (
            (not self.nesterov or self.momentum > 0, "nesterov needs a momentum above 0"),
            (
                self.patience is None or self.patience >= 1,
                f"patience must be 1 or more, not {self.patience}",
            ),
            (
                self.augment in AUGMENTATIONS,
                f'unknown augment "{self.augment}"; {did_you_mean(self.augment, AUGMENTATIONS)}',
            ),
        )
        return [*self.finetuning().problems(), *(problem for good, problem in rules if not good)]
