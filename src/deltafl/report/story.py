"""The page of `deltafl quickstart`, told to a newcomer, and the page of `deltafl search`."""

from deltafl.report.page import Code, Item, Listing, Page, Section
from deltafl.report.parts import (
    BASE,
    SINGLE,
    Result,
    bars_figure,
    cosine_figure,
    differences,
    headline,
    origin,
    percent,
    picked,
    results_table,
    row_of,
    rules_of,
    search_figures,
    training_table,
)


def quickstart_page(result: Result) -> Page:
    """The whole story: what was trained, what a delta is, what was searched, the table tested once, what next."""
    count = len(result["tasks"])
    lead = (
        f"One small vision model was fine-tuned on {count} tasks, one copy for each. Here the {count} copies are "
        "merged back into a single model that does every task, without any further training."
    )
    sections = [
        Section("What came out", _outcome(result), [headline(result)]),
        Section("What was trained", *_training(result)),
        Section(
            "What is merged",
            "A delta is what fine-tuning changed: the weights after it minus the weights before. It is called a task "
            "vector when models are merged, and a client update in federated learning; it is the same thing. Merging "
            "combines the deltas by some rule, multiplies the result by a scaling coefficient λ and adds it to the "
            "base. That is exactly one server step of federated learning.",
            [cosine_figure(result["cosine"])] if result.get("cosine") else [],
        ),
        _search(result),
        Section(
            "Tested once",
            "Only now were the test images used, once for every row: the settings were already fixed.",
            [results_table(result), bars_figure(result)],
        ),
        Section(
            "What to try next", "With a base and fine-tuned models of your own:", _next_steps()
        ),
        origin(result),
    ]
    return Page(result["title"], lead, sections)


def search_page(result: Result) -> Page:
    """What a search tried on validation data, and the table tested once."""
    best = picked(result)
    lead = "Rules and their settings were compared on validation data; the test split was used once, at the end."
    if best is not None:
        lead += f" Validation chose {best['rule']}."
    sections = [Section("What came out", _outcome(result), [headline(result)])]
    if result.get("training"):
        sections.append(
            Section(
                "What is merged",
                differences(result["training"]),
                [training_table(result["training"])],
            )
        )
    if result.get("cosine"):
        sections.append(
            Section("How the deltas lie to each other", "", [cosine_figure(result["cosine"])])
        )
    sections.append(_search(result))
    sections.append(Section("Tested once", "", [results_table(result), bars_figure(result)]))
    return Page(result["title"], lead, [*sections, origin(result)])


def _outcome(result: Result) -> str:
    best, single, base = picked(result), row_of(result, SINGLE), row_of(result, BASE)
    if best is None:
        return ""
    text = f"Validation data chose the rule `{best['rule']}`. On test images never used before, that one model "
    text += f"is right {percent(best['mean'])} of the time, averaged over the tasks"
    if single is not None:
        text += f"; separate models, each for its own task, reach {percent(single['mean'])}"
    if base is not None:
        text += f"; the base they all started from, {percent(base['mean'])}"
    return f"{text}."


def _training(result: Result) -> tuple[str, list[Item]]:
    text = (
        "All models start from the same base, which was pre-trained first. Each was then fine-tuned on its own task, "
        "and on purpose not in the same way: in real life fine-tuned models come from different people."
    )
    training = result.get("training", [])
    return f"{text} {differences(training)}", [training_table(training)] if training else []


def _search(result: Result) -> Section:
    values = {x for curve in result.get("curves", {}).values() for x, _ in curve}
    tried = f" {len(values)} values from {min(values):g} to {max(values):g}" if values else ""
    rho = (
        " Rules with a setting ρ of their own were tried with several of them; the best is shown."
        * any("rho" in row.get("params", {}) for row in rules_of(result))
    )
    text = (
        f"How far to go along the merged delta is the one choice that matters most. For every rule, λ was tried at"
        f"{tried} and scored on validation images, which neither training nor the final test uses.{rho}"
    )
    return Section("What was searched", text + _raced(result), search_figures(result))


def _raced(result: Result) -> str:
    """What a race evaluated; "" for an exhaustive search."""
    if result.get("strategy") != "racing":
        return ""
    evaluated, whole = result["examples"]["evaluated"], result["examples"]["exhaustive"]
    dropped = sum(row["dropped_at"] is not None for row in result["candidates"])
    return (
        f"\n\nThe search raced: {dropped} of {len(result['candidates'])} candidates were dropped on part of the "
        f"examples, so that {evaluated:,} examples were evaluated rather than {whole:,} ({whole / evaluated:.1f} times "
        "fewer). Their points on the curves are estimates from those examples, and none of them was chosen; the "
        "winner's value is exact."
    )


def _next_steps() -> list[Item]:
    return [
        Code(
            "deltafl inspect --base BASE --models MODEL_1 MODEL_2 ...\n"
            "deltafl merge --base BASE --models MODEL_1 MODEL_2 ... \\\n"
            "    --method fedgma --rho 0.6 --scaling-coef 0.3 --out MERGED\n"
            "deltafl search RECIPE.yaml"
        ),
        Listing(
            [
                "`inspect` measures how different the deltas are and advises a rule.",
                "`merge` writes one model that loads in `transformers`; it needs no data.",
                "`search` chooses rule, λ and ρ on your validation data, as on this page.",
            ]
        ),
    ]
