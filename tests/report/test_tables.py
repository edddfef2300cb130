from deltafl.report import Column, Table
from deltafl.report.tables import to_csv, to_latex, to_markdown

TABLE = Table(
    [
        {"rule": "single_task", "mean": 0.99, "steps": 60, "loss": 0.1},
        {"rule": "a|b & <c>", "mean": 0.9124, "steps": 240, "loss": 0.123},
        {"rule": "fedgma", "mean": 0.91239, "steps": None, "loss": 0.5, "unseen": 1},
        {"rule": "median", "mean": None, "steps": 5, "loss": float("nan")},
    ],
    {
        "rule": Column("model"),
        "mean": Column("mean", ".1%", best=True),
        "empty": Column("empty", ".1f"),
        "steps": Column("steps", ",d"),
        "loss": Column("loss", ".2g"),
    },
    "Tested *once*, 50% each",
    reference=("single_task",),
)


def test_markdown_exactly():
    assert to_markdown(TABLE) == (
        "Tested *once*, 50% each\n\n"
        "| model | mean | steps | loss |\n"
        "| :-- | --: | --: | --: |\n"
        "| single\\_task | 99.0% | 60 | 0.1 |\n"
        "| a\\|b & \\<c\\> | **91.2%** | 240 | 0.12 |\n"
        "| fedgma | **91.2%** | – | 0.5 |\n"
        "| median | – | 5 | – |\n"
    )


def test_csv_keeps_full_numbers():
    rows = [{"a": 'say "hi"', "x": 1 / 3, "n": 7}, {"a": "y", "x": None, "n": None}]
    table = Table(rows, {"a": Column("a,b"), "x": Column("x", ".1%"), "n": Column("n", "d")})
    assert to_csv(table) == '"a,b",x,n\n"say ""hi""",0.3333333333333333,7\ny,,\n'


def test_latex_exactly():
    assert to_latex(TABLE) == "\n".join(
        [
            r"\begin{table}",
            r"\caption{Tested *once*, 50\% each}",
            r"\begin{tabular}{lrrr}",
            r"\toprule",
            r"model & mean & steps & loss \\",
            r"\midrule",
            r"single\_task & 99.0\% & 60 & 0.1 \\",
            r"a|b \& <c> & \textbf{91.2\%} & 240 & 0.12 \\",
            r"fedgma & \textbf{91.2\%} & -- & 0.5 \\",
            r"median & -- & 5 & -- \\",
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def test_a_reference_is_never_the_best_and_titles_may_be_the_same():
    assert TABLE.references == [True, False, False, False]
    twice = Table([{"a": 1, "b": 2}], {"a": Column("x", "d"), "b": Column("x", "d")})
    assert twice.cells().to_numpy().tolist() == [["1", "2"]]
    assert list(twice.cells()) == ["x", "x"]
