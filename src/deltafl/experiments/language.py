"""Language models merged: how likely the answers of all tasks are, and what the merges write."""

import pandas as pd

from deltafl.experiments.merges import REFERENCE, Search, told
from deltafl.experiments.rivals import AVERAGE, Rival
from deltafl.experiments.study import Data, Study
from deltafl.experiments.sweep import Cell, Found, Result, Sweep, points_of, tabulate
from deltafl.rules.building import load_rules


def language(study: Study, sweep: Sweep) -> list[Cell]:
    """All tasks merged by every rule that is compared, lambda and rho chosen by likelihood; rules
    that need examples get the second of several numbers.
    """
    recipe = study.recipe
    models = tuple(study.tuned(Data(spec)) for spec in recipe.tasks)
    rules = tuple(dict.fromkeys((REFERENCE, *(recipe.methods or load_rules()))))
    counts, written = recipe.examples_values, tuple(recipe.written.items())
    search = Search(models, recipe.search_strategy, rules, counts[min(1, len(counts) - 1)], written)
    return [Cell({}, search), Cell({}, Rival(models, AVERAGE))]


def language_rows(found: Found) -> Result:
    """For every model the share of what the tasks' own models gained over the base, the gain over
    task arithmetic, the score of each task, and what is judged of what it writes. scores: column ->
    metric.
    """
    points, scores = points_of(found), dict[str, str]()
    tested = []
    for one in (one for _, one in found if "rows" in one):
        seed = one["points"][0]["seed"]
        for row in told(one["rows"]):
            tested.append({"rule": row["rule"], "seed": seed, **row["test"], **row["also"]})
            scores |= dict.fromkeys(row["test"], "log-likelihood")
            scores |= {name: name.rpartition(", ")[2] for name in row["also"]}
    columns = pd.DataFrame(tested).drop_duplicates(["rule", "seed"])
    points = points.merge(columns, "left", ["rule", "seed"])
    rows = tabulate(points, ["rule"], "normalized", *scores)
    return {"rows": rows, "scores": scores}
