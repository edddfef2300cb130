"""Made-up results in the shapes that the commands hand to the report."""

import math
from typing import Any

TASKS = ["plain", "inverted", "rotated", "noisy"]


def quickstart_result() -> dict[str, Any]:
    peaks = {
        "task_arithmetic": (0.35, 0.861), "fednova": (0.45, 0.902), "fedgma": (0.5, 0.913), "median": (0.6, 0.842),
    }  # fmt: skip
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
    rows.append({**rows[2], "rule": "fedavg"})
    trainings = zip(TASKS, [1e-3, 3e-4, 1e-3, 1e-4], [60, 240, 120, 480], [1, 2, 3, 4], strict=True)
    return {
        "title": "Four fine-tuned models, merged into one", "metric": "accuracy", "criterion": "normalized",
        "strategy": "exhaustive", "seed": 0, "seconds": 71.3, "tasks": TASKS, "single": single, "rows": rows,
        "curves": {**curves, "fedavg": curves["task_arithmetic"]},
        "chosen": {**{rule: at for rule, (at, _) in peaks.items()}, "fedavg": 0.35},
        "cosine": {
            "names": TASKS,
            "matrix": [[1.0 if i == j else (i + j) / 10 - 0.2 for j in range(4)] for i in range(4)],
        },
        "training": [
            {"model": t, "task": t, "lr": lr, "num_steps": steps, "num_examples": 719, "norm": norm}
            for t, lr, steps, norm in trainings
        ],
        "versions": {"deltafl": "0.1.0", "torch": "2.13.0"},
        "command": "deltafl quickstart --seed 0 --out quickstart",
    }  # fmt: skip


def race_result() -> dict[str, Any]:
    """A search that raced, beside what others publish."""
    return quickstart_result() | {
        "strategy": "racing", "reference": {"RegMean": 0.71}, "examples": {"evaluated": 1500, "exhaustive": 6000},
        "candidates": [{"dropped_at": None}, {"dropped_at": 2}, {"dropped_at": 3}],
    }  # fmt: skip


def inspect_result() -> dict[str, Any]:
    tasks = ("sun397", "cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")
    models = [f"clip-vit-b32-{name}" for name in tasks]
    count = range(len(models))
    layers = ["embeddings", *(f"layer {i}" for i in range(12)), "layernorm"]

    def pairs(start: float, scale: int) -> dict[str, Any]:
        matrix = [[1.0 if i == j else (i * j % 7) / scale + start for j in count] for i in count]
        return {"names": models, "matrix": matrix}

    return {
        "models": models, "cosine": pairs(-0.03, 30), "sign_agreement": pairs(0.48, 60),
        "overlap_layers": {name: [0.2 + k / 40, 0.04] for k, name in enumerate(layers[:-1])},
        "layers": {
            m: [[name, 1 + i + math.sin(k)] for k, name in enumerate(layers)]
            for i, m in enumerate(models)
        },
        "training": [
            {"model": m, "num_steps": 500 * (1 + i % 4), "num_examples": 20000, "norm": 2.0 + i}
            for i, m in enumerate(models)
        ],
        "advice": ["Norms differ 4.5x and steps differ 4x: try fednova or cclip."],
    }  # fmt: skip


def _row(
    rule: str, test: dict[str, float], val: float, scaling_coef: float | None
) -> dict[str, Any]:
    return {
        "rule": rule, "params": {}, "scaling_coef": scaling_coef, "server_lr": scaling_coef and scaling_coef * 4,
        "val": val, "test": test, "mean": sum(test.values()) / len(test), "normalized": val,
    }  # fmt: skip


def federated_result(**changes: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """result.json and record.jsonl of a run of 100 rounds, validated after every fifth."""
    start = {"event": "start", "round": 0, "val_score": 0.1, "parameters": 1000, "kept": 500}
    rows: list[dict[str, Any]] = [start | {"setup_bytes_up": 300_000, "setup_bytes_down": 52_000}]
    for i in range(1, 101):
        row = {"event": "round", "round": i, "val_score": None if i % 5 else 0.8 - 0.7 / i}
        row |= {"loss": 2 / i, "num_steps": 40, "failed": [], "bytes_up": 1_500_000}
        row |= {"bytes_down": 1_600_000, "bytes_up_total": 1_500_000 * i, "peak_memory_bytes": 6e8}
        rows.append(row | {"client_seconds": 0.5, "server_seconds": 0.01})
    config = {"num_clients": 20, "participation_rate": 0.25, "local_steps": 8, "patience": None}
    result = {
        "title": "digits: 20 clients, fedavg", "metric": "accuracy", "test_score": 0.73, "test_examples": 200,
        "val_score": 0.793, "best_round": 100, "rounds": 100, "failed_updates": 0,
        "bytes_up_total": 150_000_000, "dense_bytes_up_total": 300_000_000, "setup_bytes_up": 300_000,
        "setup_bytes_down": 52_000,
        "config": {**config, "sparse": {"sparsity_ratio": 0.5}, "class_names": ["digit"] * 100},
    }  # fmt: skip
    return result | changes, rows


def centralized_result() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = [{"event": "start", "epoch": 0, "val_score": -3.0}]
    for i in range(1, 5):
        row = {"event": "epoch", "epoch": i, "lr": 1e-3, "train_loss": 3 / i, "val_score": -3 / i}
        rows.append({**row, "seconds": 1.0})
    result = {
        "title": "lines: centralised training", "metric": "log-likelihood", "test_score": -0.8125,
        "test_examples": 31, "val_score": -0.75, "best_epoch": 4, "epochs": 4, "stopped_early": False,
        "seconds": 4.0, "config": {"epochs": 4, "patience": None},
    }  # fmt: skip
    return result, rows


def mask_result(tensors: dict[str, tuple[int, int]], **changes: Any) -> dict[str, Any]:
    """Of tensors by name: how many coordinates are kept, and how many are eligible."""
    result = {
        "made": {"mask_strategy": "random"}, "model_hash": "0", "parameters": 1000,
        "excluded": {f"layers.{i}.k.bias": "softmax is shift-invariant" for i in range(2)},
        "eligible": sum(n for _, n in tensors.values()), "kept": sum(k for k, _ in tensors.values()),
        "tensors": [{"name": name, "kept": k, "eligible": n} for name, (k, n) in tensors.items()],
    }  # fmt: skip
    return result | changes


def shards_result(counts: list[list[int]]) -> dict[str, Any]:
    """Of counts of examples, clients down, classes across."""
    return {
        "task": "t", "seed": 0, "how": "iid()", "num_clients": len(counts),
        "class_names": [f"class <{c}>" for c in range(len(counts[0]))], "sizes": [sum(row) for row in counts],
        "classes": [sum(n > 0 for n in row) for row in counts], "left_out": [0] * len(counts[0]), "counts": counts,
    }  # fmt: skip


def suite_result(number: int = 3, failed: str = "", **changes: Any) -> dict[str, Any]:
    """Of a suite; in each next row the clients send twice as much. A row that failed goes first."""
    names = [f"Nc = {i}" for i in range(number)]
    rows = [{"sharding": "IID", "runs": 0}] if failed else []
    rows += [
        {"sharding": name, "runs": 2, "mean": 0.5 - 0.01 * i, "spread": 0.01, "val_score": 0.5}
        | {"best_round": 4, "megabytes_up": 4.0, **changes}
        for i, name in enumerate(names)
    ]
    scores = [[0.1 + 0.05 * r - 0.01 * i for r in range(5)] for i in range(number)]
    curves = dict(zip(names, scores, strict=True))
    return {
        "labels": ["sharding"], "rows": rows, "notes": [f"krum: {failed}"] if failed else [],
        "by_round": {name: list(enumerate(curve)) for name, curve in curves.items()},
        "by_bytes": {n: [(2**i * r, y) for r, y in enumerate(c)] for i, (n, c) in enumerate(curves.items())},
    }  # fmt: skip


def study_results() -> dict[str, dict[str, Any]]:
    """One result for each study."""
    rules = ["task_arithmetic", "median"]
    gain = {"gain": 0.01, "low": -0.02, "high": 0.04}

    def rows(**more: Any) -> list[dict[str, Any]]:
        told = {"mean": 0.8, "spread": 0.02, "runs": 2, **more}
        names = ["single-task models", "base (unmerged)", *rules]
        return [{"rule": r, **told, **(gain if r == "median" else {})} for r in names]

    def ways(names: list[str], **scores: float) -> dict[str, Any]:
        means = {"mean": 0.5, "spread": None, "scaling_coef": 0.5, "runs": 1}
        points = [{"way": way, "task": task, **scores} for way in names for task in TASKS[:2]]
        return {"rows": [{"way": way, **means} for way in names], "points": points, "notes": []}

    points = [
        {"rule": r, "gain": 0.01 * i if r == "median" else None, "steps_ratio": i, "norm_ratio": 1.1 * i}
        for r in rules
        for i in (1, 5)
    ]  # fmt: skip
    curves = {rule: [(0.0, 0.4), (0.5, 0.9), (1.0, 0.2)] for rule in rules}
    sizes = (("near", 2), ("far", 2), ("all", 3))
    forgotten = ways(["base", "fine-tuned", "negated task vector"], target=0.5, control=0.5)
    for row in forgotten["rows"]:
        row |= {"control": 0.9, "control_spread": None}
    return {
        "training-heterogeneity": {
            "rows": rows(kind="alike", accuracy=0.7), "points": points,
            "relations": [{"rule": "median", "points": 2, "steps": 0.3}], "notes": ["krum: too few"],
        },
        "data-heterogeneity": {
            "rows": [r for s, n in sizes for r in rows(subset=s, size=n, cosine=0.1)], "notes": [],
        },
        "scaling-coef": {
            "rows": rows(accuracy=0.7, scaling_coef=0.3), "by_lambda": curves, "notes": [],
        },
        "examples": {
            "rows": [r for n in (8, 32) for r in rows(examples=n, accuracy=0.7, worst=0.6)],
            "by_examples": {"median": [(8, 0.7), (32, 0.8)]}, "notes": [],
        },
        "negation": {**forgotten, "control": "digits"},
        "analogy": ways(["base", "C + (B - A)", "fine-tuned on D"], test=0.5),
    }  # fmt: skip


def comparison_result(**changes: Any) -> dict[str, Any]:
    told = {"model": "m", "task": "digits", "metric": "accuracy", "num_runs": 2}
    suites = {"heterogeneity": suite_result()}
    return {**told, "suites": suites, "studies": study_results()} | changes
