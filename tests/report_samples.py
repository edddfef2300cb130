"""Made-up results in the shapes that the commands hand to the report."""

import math
from typing import Any

TASKS = ["plain", "inverted", "rotated", "noisy"]


def quickstart_result() -> dict[str, Any]:
    peaks = {
        "task_arithmetic": (0.35, 0.861),
        "fednova": (0.45, 0.902),
        "fedgma": (0.5, 0.913),
        "median": (0.6, 0.842),
    }
    curves = {
        rule: [
            [k / 20, 0.42 + (top - 0.42) * math.exp(-(((k / 20 - at) / 0.35) ** 2))]
            for k in range(1, 21)
        ]
        for rule, (at, top) in peaks.items()
    }
    single = dict(zip(TASKS, [0.984, 0.98, 0.967, 0.96], strict=True))
    base = dict(zip(TASKS, [0.9, 0.381, 0.457, 0.361], strict=True))
    rows = [_row("single-task models", single, 1.0, None), _row("base (unmerged)", base, 0.48, 0.0)]
    rows += [
        _row(rule, {t: single[t] * top for t in TASKS}, top, at)
        for rule, (at, top) in peaks.items()
    ]
    rows[4]["params"] = {"rho": 0.6}
    rows.append({**rows[2], "rule": "fedavg", "same_as": "task_arithmetic"})
    return {
        "title": "Four fine-tuned models, merged into one",
        "seed": 0,
        "seconds": 71.3,
        "tasks": TASKS,
        "single": single,
        "rows": rows,
        "curves": {**curves, "fedavg": curves["task_arithmetic"]},
        "chosen": {**{rule: at for rule, (at, _) in peaks.items()}, "fedavg": 0.35},
        "cosine": {
            "names": TASKS,
            "matrix": [[1.0 if i == j else (i + j) / 10 - 0.2 for j in range(4)] for i in range(4)],
        },
        "training": [
            {"task": task, "lr": lr, "num_steps": steps, "num_examples": 719, "norm": norm}
            for task, lr, steps, norm in zip(
                TASKS, [1e-3, 3e-4, 1e-3, 1e-4], [60, 240, 120, 480], [1, 2, 3, 4], strict=True
            )
        ],
        "versions": {"deltafl": "0.1.0", "torch": "2.13.0"},
        "command": "deltafl quickstart --seed 0 --out quickstart",
    }


def inspect_result() -> dict[str, Any]:
    models = [
        f"clip-vit-b32-{name}"
        for name in ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
    ]
    count = range(len(models))
    layers = ["embeddings", *(f"layer {i}" for i in range(12)), "layernorm"]
    return {
        "models": models,
        "norms": {model: 2.0 + i for i, model in enumerate(models)},
        "cosine": {
            "names": models,
            "matrix": [[1.0 if i == j else (i * j % 7) / 30 - 0.03 for j in count] for i in count],
        },
        "sign_agreement": {
            "names": models,
            "matrix": [[1.0 if i == j else 0.48 + (i * j % 7) / 60 for j in count] for i in count],
        },
        "layers": {
            m: [[name, 1 + i + math.sin(k)] for k, name in enumerate(layers)]
            for i, m in enumerate(models)
        },
        "training": [
            {"task": m, "lr": 1e-5, "num_steps": 500 * (1 + i % 4), "num_examples": 20000}
            for i, m in enumerate(models)
        ],
        "advice": ["Norms differ 4.5x and steps differ 4x: try `fednova` or `cclip`."],
    }


def _row(
    rule: str, test: dict[str, float], val: float, scaling_coef: float | None
) -> dict[str, Any]:
    mean = sum(test.values()) / len(test)
    return {
        "rule": rule,
        "params": {},
        "scaling_coef": scaling_coef,
        "server_lr": scaling_coef and scaling_coef * len(TASKS),
        "val": val,
        "test": test,
        "mean": mean,
        "normalized": val,
    }
