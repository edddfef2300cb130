"""What decides a federated run: one frozen recipe, checked where it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.federated.sharding import ShardingRecipe
from deltafl.rules.rule import Rule, Source, build_rule, check_rule, load_rules
from deltafl.sparse.calibration import KINDS
from deltafl.sparse.masks import MASK_STRATEGIES
from deltafl.training.recipe import PRECISIONS
from deltafl.training.step import SCHEDULES

LOCAL_ALGORITHMS = ("sgd", "fedprox", "scaffold")
SERVER_OPTIMIZERS = ("sgd", "fedadam", "fedyogi", "fedadagrad")
AUGMENTATIONS = ("none", "flip", "crop_flip")
CLIENT_WEIGHTS = ("examples", "uniform")
SCOPES = ("global", "per_layer")
FISHER_LABELS = ("sampled", "empirical", "exact")


@dataclass(frozen=True)
class FederatedRecipe:
    """A federated run: K clients, a fraction C of them in each round, J local steps each, then one server step.

    num_clients K; participation_rate C; local_steps J; local_steps_spread S >= 1: a client's own number of steps is
    J S^u, u uniform in [-1, 1] and keyed by the client; batch_size, lr, momentum, weight_decay, nesterov, grad_clip,
    label_smoothing: of local SGDM; lr_schedule: over rounds. local_algorithm: sgd, fedprox (prox_mu) or scaffold.
    sharding: iid, non_iid (nc, allow_missing_classes) or dirichlet (alpha). aggregator with
    aggregator_params: any registered rule; client_weights: what it weighs clients by. server_optimizer with server_lr,
    server_momentum (None: 0 for sgd, 0.9 for the adaptive ones), server_beta2, server_tau (arXiv 2003.00295). head:
    ridge (Fed3R, from sums of the clients' statistics), probe (logistic regression), linear (random), zero-shot (CLIP;
    templates: a file of prompts) or a file; it is frozen unless train_head. sparsity_ratio: share of frozen
    coordinates; mask_*, calibration_* and fisher_* say how they are chosen, mask_file is a mask that `deltafl mask`
    wrote. eval_every: rounds between validations; patience: validations without a gain after which the run ends.
    client: a user's own, `module:attr`.
    """

    num_clients: int = 100
    participation_rate: float = 0.1
    local_steps: int = 4
    local_steps_spread: float = 1.0
    num_rounds: int = 50
    batch_size: int = 64
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0
    nesterov: bool = False
    grad_clip: float | None = None
    label_smoothing: float = 0.0
    lr_schedule: str = "constant"
    augment: str = "none"
    local_algorithm: str = "sgd"
    prox_mu: float = 0.01
    sharding: str = "iid"
    nc: int | None = None
    allow_missing_classes: bool = False
    alpha: float | None = None
    aggregator: str = "fedavg"
    aggregator_params: Mapping[str, Any] = field(default_factory=dict)
    client_weights: str = "examples"
    server_optimizer: str = "sgd"
    server_lr: float = 1.0
    server_momentum: float | None = None
    server_beta2: float = 0.99
    server_tau: float = 1e-3
    head: str = "ridge"
    few_shot: int | None = None
    templates: str | None = None
    train_head: bool = False
    sparsity_ratio: float = 0.0
    mask_strategy: str = "least_sensitive"
    mask_scope: str = "global"
    mask_file: str | None = None
    calibration: str = "average"
    calibration_rounds: int = 1
    calibration_examples: int = 64
    attenuate: float | None = None
    fisher_labels: str = "sampled"
    fisher_draws: int = 1
    eval_every: int = 1
    patience: int | None = None
    mixed_precision: str = "no"
    client: str | None = None
    seed: int = 0

    def problems(self) -> list[str]:
        """What is wrong with the values, one line each."""
        chosen = self.clients_per_round
        rules = (
            (
                0 < self.participation_rate <= 1,
                f"participation_rate must be in (0, 1], not {self.participation_rate}",
            ),
            (
                chosen >= 1 or self.num_clients < 1 or not 0 < self.participation_rate <= 1,
                f"participation_rate {self.participation_rate} of {self.num_clients} clients selects no client; "
                f"take at least {1 / (self.num_clients or 1):g}",
            ),
            (self.local_steps >= 1, f"local_steps must be 1 or more, not {self.local_steps}"),
            (
                self.local_steps_spread >= 1,
                f"local_steps_spread is a factor from 1, not {self.local_steps_spread}",
            ),
            (self.num_rounds >= 1, f"num_rounds must be 1 or more, not {self.num_rounds}"),
            (self.batch_size >= 1, f"batch_size must be 1 or more, not {self.batch_size}"),
            (self.lr > 0, f"lr must be positive, not {self.lr}"),
            (0 <= self.momentum < 1, f"momentum must be in [0, 1), not {self.momentum}"),
            (not self.nesterov or self.momentum > 0, "nesterov needs a momentum above 0"),
            (self.weight_decay >= 0, f"weight_decay must be 0 or more, not {self.weight_decay}"),
            (
                self.grad_clip is None or self.grad_clip > 0,
                f"grad_clip must be positive, not {self.grad_clip}",
            ),
            (
                0 <= self.label_smoothing < 1,
                f"label_smoothing must be in [0, 1), not {self.label_smoothing}",
            ),
            (self.prox_mu >= 0, f"prox_mu must be 0 or more, not {self.prox_mu}"),
            (
                self.local_algorithm != "scaffold"
                or (self.momentum == 0 and self.weight_decay == 0),
                "scaffold's control variates are those of plain SGD; set momentum and weight_decay to 0",
            ),
            (self.server_lr > 0, f"server_lr must be positive, not {self.server_lr}"),
            (
                self.server_momentum is None or 0 <= self.server_momentum < 1,
                f"server_momentum must be in [0, 1), not {self.server_momentum}",
            ),
            (
                0 <= self.server_beta2 < 1,
                f"server_beta2 must be in [0, 1), not {self.server_beta2}",
            ),
            (self.server_tau > 0, f"server_tau must be positive, not {self.server_tau}"),
            (self.few_shot is None or self.head == "ridge", "few_shot is about the ridge head"),
            (
                self.templates is None or self.head == "zero-shot",
                "templates are about the zero-shot head",
            ),
            (
                0 <= self.sparsity_ratio < 1,
                f"sparsity_ratio must be in [0, 1), not {self.sparsity_ratio}",
            ),
            (
                self.calibration_rounds >= 1,
                f"calibration_rounds must be 1 or more, not {self.calibration_rounds}",
            ),
            (
                self.calibration_examples >= 1,
                f"calibration_examples must be positive, not {self.calibration_examples}",
            ),
            (self.fisher_draws >= 1, f"fisher_draws must be 1 or more, not {self.fisher_draws}"),
            (self.eval_every >= 1, f"eval_every must be 1 or more, not {self.eval_every}"),
            (
                self.patience is None or self.patience >= 1,
                f"patience must be 1 or more, not {self.patience}",
            ),
            *(
                (value in known, f'unknown {kind} "{value}"; {did_you_mean(value, known)}')
                for kind, value, known in (
                    ("lr_schedule", self.lr_schedule, SCHEDULES),
                    ("augment", self.augment, AUGMENTATIONS),
                    ("local_algorithm", self.local_algorithm, LOCAL_ALGORITHMS),
                    ("client_weights", self.client_weights, CLIENT_WEIGHTS),
                    ("server_optimizer", self.server_optimizer, SERVER_OPTIMIZERS),
                    ("mask_strategy", self.mask_strategy, tuple(MASK_STRATEGIES)),
                    ("mask_scope", self.mask_scope, SCOPES),
                    ("calibration", self.calibration, KINDS),
                    ("fisher_labels", self.fisher_labels, FISHER_LABELS),
                    ("mixed_precision", self.mixed_precision, PRECISIONS),
                )
            ),
        )
        problems = [problem for good, problem in rules if not good]
        for check in (self.rule, self.shards):
            try:
                check()
            except DeltaflError as error:
                problems += error.problems
        return problems or self._conflicts()

    def _conflicts(self) -> list[str]:
        """What values that are good one by one cannot do together."""
        asked = self.clients_per_round * self.calibration_rounds
        rules = (
            (
                not self.calibrated or asked <= self.num_clients,
                f"{self.calibration_rounds} calibration rounds of {self.clients_per_round} fresh clients each need "
                f"more than the {self.num_clients} clients; lower calibration_rounds or participation_rate",
            ),
            (
                self.mask_file is None or self.sparsity_ratio == 0,
                "mask_file is a finished mask, and sparsity_ratio asks for another; give one of them",
            ),
        )
        return [problem for good, problem in rules if not good]

    @property
    def clients_per_round(self) -> int:
        """round(C K)."""
        return round(self.participation_rate * self.num_clients)

    @property
    def sparse(self) -> bool:
        """Whether a mask is used."""
        return self.sparsity_ratio > 0 or self.mask_file is not None

    @property
    def calibrated(self) -> bool:
        """Whether clients are asked for Fisher sums: there is a mask to make, and its strategy needs scores."""
        wanted = self.sparsity_ratio > 0 and self.mask_file is None
        return wanted and MASK_STRATEGIES[self.mask_strategy].needs_scores

    def rule(self, number: int = 0) -> Rule:
        """The aggregation rule of a round; one that draws (dare) draws anew in each, unless its seed is given.

        Raises DeltaflError if there is no such rule or parameter.
        """
        rule = load_rules()[self.aggregator]
        return build_rule(self.aggregator, rule.seeded(self.aggregator_params, self.seed + number))

    def check_clients(self) -> None:
        """Raise DeltaflError if the rule cannot work with the clients of a round, as `LocalTraining` describes them."""
        if self.client is None:
            mu = self.prox_mu if self.local_algorithm == "fedprox" else None
            source = Source(
                "client",
                num_examples=1,
                num_steps=1,
                lr=self.lr,
                momentum=self.momentum,
                prox_mu=mu,
            )
            check_rule(self.rule(), [source] * self.clients_per_round)

    def shards(self) -> ShardingRecipe:
        """The sharding with its parameters."""
        return ShardingRecipe.of(
            num_clients=self.num_clients,
            sharding=self.sharding,
            nc=self.nc,
            allow_missing_classes=self.allow_missing_classes,
            alpha=self.alpha,
        )
