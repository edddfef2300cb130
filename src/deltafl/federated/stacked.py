"""All clients of a round in one batch of models: `--engine vmap`."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from deltafl.algebra.deltas import Difference
from deltafl.algebra.tensors import Tensors
from deltafl.errors import DeltaflError
from deltafl.federated.client import ClientUpdate, Round, augmented, load_params, moving
from deltafl.federated.recipe import FederatedRecipe
from deltafl.models.flat import FlatModel
from deltafl.models.heads import LinearHead
from deltafl.rules.rule import Source
from deltafl.seeding import keyed_generator
from deltafl.sparse.masks import Mask
from deltafl.sparse.sgdm import sgdm_
from deltafl.training.step import batches


class StackedTraining:
    """`LocalTraining` of all chosen clients together: every parameter is (K, *shape), a row for each client.

    Row k moves by w_k <- SGDM(w_k, grad of the mean loss of client k's own batch), with the batches, schedule and
    clipping of sequential training, to which the result is equal up to float rounding. The forward pass is
    `vmap(functional_call)`; the gradient of the sum of all clients' losses then holds each client's own in its row.
    Clients whose number of steps differs are stacked in groups of equal numbers. Memory is that of 3 K models.

    Served: plain local SGD with momentum, Nesterov, weight decay, clipping, label smoothing and augmentation, a frozen
    head, no mask, float32.

    Raises:
        DeltaflError: the recipe or the model asks for anything else (see `unsupported`).
    """

    def __init__(self, model: FlatModel, head: LinearHead, recipe: FederatedRecipe) -> None:
        if problems := unsupported(model, head, recipe):
            raise DeltaflError(
                *(f"engine vmap does not serve {what}; use engine sequential" for what in problems)
            )
        self.model, self.head, self.recipe = model, head, recipe
        self._net = _Logits(model, head)

    def __call__(self, params: Tensors, mask: Mask | None, round: Round) -> ClientUpdate:
        """One client alone."""
        return self.train_all(params, mask, [round])[0]

    def train_all(
        self, params: Tensors, mask: Mask | None, rounds: Sequence[Round]
    ) -> list[ClientUpdate]:
        """The updates of all clients, in the order of `rounds`; each is told an equal share of the seconds.

        Raises:
            DeltaflError: a mask or a control variate is given, or the model does what vmap cannot (random numbers,
                buffers that change, decisions by value).
        """
        if mask is not None or any(r.control is not None for r in rounds):
            raise DeltaflError(
                "engine vmap serves neither masks nor control variates; use engine sequential"
            )
        load_params(self.model, self.head, params)
        updates: dict[int, ClientUpdate] = {}
        for kind in dict.fromkeys((r.num_steps, r.lr) for r in rounds):
            places = [i for i, r in enumerate(rounds) if (r.num_steps, r.lr) == kind]
            updates.update(
                zip(places, self._train_group(params, [rounds[i] for i in places]), strict=True)
            )
        return [updates[i] for i in range(len(rounds))]

    def _train_group(self, params: Tensors, rounds: Sequence[Round]) -> list[ClientUpdate]:
        """Clients with equal numbers of steps."""
        started = time.perf_counter()
        r, count, steps = self.recipe, len(rounds), rounds[0].num_steps
        own = self.model.tensors()
        start = self.model.flat.detach()
        weights = torch.empty(count * len(start), device=start.device)
        gradients = torch.zeros_like(weights)
        momentum = torch.empty_like(weights) if r.momentum else None
        leaves: dict[str, Tensor] = {}
        for name, part in self.model.slices.items():
            place, shape = slice(count * part.start, count * part.stop), (count, *own[name].shape)
            leaf = weights[place].view(shape).copy_(own[name]).requires_grad_()
            leaf.grad = gradients[place].view(shape)
            leaves[f"encoder.{name}"] = leaf
        group = {"lr": rounds[0].lr, "momentum": r.momentum, "dampening": 0.0, "weight_decay": r.weight_decay,
                 "nesterov": r.nesterov}  # fmt: skip
        totals = torch.zeros(count, device=self.model.device)
        self.model.module.train()
        own_batches = (
            batches(p.ids, r.batch_size, r.seed, steps, f"round {p.number} client {p.client}")
            for p in rounds
        )
        for step, chosen in enumerate(zip(*own_batches, strict=True)):
            images, labels, shares = self._batch(rounds, chosen, step)
            gradients.zero_()
            losses = self._losses(leaves, images, labels, shares)
            losses.sum().backward()
            totals += losses.detach()
            if r.grad_clip is not None:
                clip_rows_(
                    [leaf.grad for leaf in leaves.values() if leaf.grad is not None], r.grad_clip
                )
            sgdm_(weights, gradients, momentum, step == 0, group)
        rest = {n: params[n] for n in moving(self.model, self.head) if n not in own}
        means = (totals / steps).tolist()
        seconds = (time.perf_counter() - started) / count
        updates = []
        for k, part in enumerate(rounds):
            after = {n: leaves[f"encoder.{n}"].detach()[k] for n in own} | rest
            source = Source(
                f"client {part.client}",
                num_examples=len(part.ids),
                num_steps=steps,
                lr=part.lr,
                momentum=r.momentum,
            )
            delta = Difference(params, after)
            updates.append(ClientUpdate(delta, source, means[k], seconds))
        return updates

    def _batch(
        self, rounds: Sequence[Round], chosen: Sequence[Tensor], step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised images (K, B, C, H, W), labels (K, B) and shares in the mean (K, B) of each client's rows.

        A client whose batch is shorter than B repeats its first example with share 0.
        """
        r, split = self.recipe, rounds[0].split
        size = max(map(len, chosen))
        rows = torch.stack([torch.cat([ids, ids[:1].expand(size - len(ids))]) for ids in chosen])
        sizes = torch.tensor([[len(ids)] for ids in chosen])
        shares = (torch.arange(size) < sizes) / sizes
        images, labels = split.at(rows.reshape(-1), self.model.device)
        if r.augment != "none":
            own = zip(images.split(size), chosen, rounds, strict=True)
            images = torch.cat([self._augmented(x, len(ids), part, step) for x, ids, part in own])
        normalised = self.model.encoder.input.normalise(images).unflatten(0, rows.shape)
        return normalised, labels.view(rows.shape), shares.to(self.model.device)

    def _augmented(self, images: Tensor, count: int, part: Round, step: int) -> Tensor:
        """The first `count` images changed as sequential training changes them; the rest fill the batch up."""
        r = self.recipe
        key = keyed_generator(r.seed, "augment", f"round {part.number} client {part.client}", step)
        return torch.cat([augmented(images[:count], r.augment, key), images[count:]])

    def _losses(
        self, leaves: dict[str, Tensor], images: Tensor, labels: Tensor, shares: Tensor
    ) -> Tensor:
        """Mean cross-entropy of each client's batch under its own model, (K,)."""

        def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor, share: Tensor) -> Tensor:
            logits = functional_call(self._net, parameters, (x,))
            each = nn.functional.cross_entropy(
                logits, y, reduction="none", label_smoothing=self.recipe.label_smoothing
            )
            return (each * share).sum()

        buffers = [(n, b, b._version) for n, b in self.model.module.named_buffers()]
        try:
            with sdpa_kernel(SDPBackend.MATH):
                losses = vmap(loss, randomness="error")(leaves, images, labels, shares)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise DeltaflError(
                f"engine vmap cannot run this model ({reason}); use engine sequential"
            ) from error
        if changed := next((n for n, b, version in buffers if b._version != version), None):
            raise DeltaflError(
                f'engine vmap cannot run this model: buffer "{changed}" changes; use engine sequential'
            )
        return losses


def unsupported(model: FlatModel, head: LinearHead, recipe: FederatedRecipe) -> list[str]:
    """What of a run needs sequential training."""
    problems = recipe.needs_sequential()
    if head.parameters() and not recipe.train_head:
        problems.append("train_head")
    for name, module in model.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            problems.append(f'batch norm in training ("{name}")')
        elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            problems.append(f'dropout ("{name}")')
    return problems


def clip_rows_(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each row of tensors (K, ...), all together one gradient, down to a 2-norm of `max_norm`, in place."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    for g in gradients:
        g.mul_(scale.view(-1, *[1] * (g.ndim - 1)))


class _Logits(nn.Module):
    """Normalised images -> logits; only the encoder has parameters."""

    def __init__(self, model: FlatModel, head: LinearHead) -> None:
        super().__init__()
        self.encoder = model.module
        self._embed = model.encoder.embed
        self._head = head

    def forward(self, images: Tensor) -> Tensor:
        return self._head.logits(self._embed(self.encoder, images)).float()
