"""A command made from a recipe: its options, its help, its file, and what it says of mistakes."""

from typing import Annotated, Literal

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import ByteSize, Field

from deltafl.cli.command import flag, recipe_command
from deltafl.recipes import Flags, Recipe, one_of
from deltafl.rules.building import load_rules
from deltafl.rules.parameters import RuleParameters
from deltafl.rules.rule import parameters


class Server(RuleParameters):
    rule: Annotated[str, one_of(load_rules)] = Field(
        "fedavg", description="Any method of `deltafl rules`."
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="Of the server.")


class Whole(Recipe):
    model: Annotated[str, Flags(("--model", "--base"))] = Field(description="The model.")
    tasks: tuple[str, ...] = Field((), description="Data sets.")
    lambdas: tuple[float, ...] = Field((0.1, 1.0), description="Coefficients.")
    num_clients: int = Field(100, ge=1, description="Clients.")
    precision: Literal["no", "bf16"] = Field("no", description="Of the arithmetic.")
    size: ByteSize = Field("5GB", validate_default=True, description="Of a file.")
    hash: bool = Field(False, description="Hash everything.")
    pin: bool = Field(True, description="Pin memory.")
    by_name: dict[str, float] = Field({}, description="Only in a file.")
    server: Server = Server()


@recipe_command(Whole, "quiet", argument="config")
@click.pass_context
def command(ctx: click.Context, recipe: Whole) -> None:
    """Do it."""
    click.echo("done")
    ctx.obj.append((recipe, flag("quiet")))


def run(*args: object) -> tuple[Result, list[tuple[Whole, bool]]]:
    seen: list[tuple[Whole, bool]] = []
    return CliRunner().invoke(command, list(map(str, args)), obj=seen), seen


def test_every_option_reaches_its_setting():
    result, seen = run(
        *("--base", "m", "--tasks", "a", "b", "--tasks", "c", "--lambdas", "-0.5", "2"),
        *("--num-clients", "3", "--precision", "bf16", "--size", "3MB", "--hash", "--no-pin"),
        *("--rule", "ties", "--density", "0.3", "--per-tensor", "--momentum", "0.5", "--quiet"),
    )
    assert result.exit_code == 0, result.output
    wanted = Whole(
        model="m", tasks=("a", "b", "c"), lambdas=(-0.5, 2.0), num_clients=3, precision="bf16",
        size=3_000_000, hash=True, pin=False,
        server=Server(rule="ties", density=0.3, per_tensor=True, momentum=0.5),
    )  # fmt: skip
    assert seen == [(wanted, True)]
    assert not result.output


def test_help_says_range_default_and_section():
    text = " ".join(run("--help")[0].output.split())
    for part in (
        "--model, --base TEXT The model.",
        "--lambdas FLOAT Coefficients. Default: 0.1 1.0.",
        "--num-clients INTEGER Clients. 1 or more. Default: 100.",
        "--precision [no|bf16] Of the arithmetic. Default: no.",
        "--size TEXT Of a file. Default: 5GB.",
        "--pin / --no-pin",
        "Server: --rule TEXT",
        "--momentum FLOAT Of the server. 0 or more. Below 1.",
    ):
        assert part in text
    assert "by-name" not in text


def test_every_parameter_of_every_rule_is_an_option():
    text = run("--help")[0].output
    for name, rule in ((name, load_rules()[name]) for name in load_rules()):
        for key in parameters(rule):
            assert f"--{key.replace('_', '-')} " in text, name


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "model is missing; name it with --model"),
        (["--model", "m", "--momentum", "1"], "server.momentum: must be less than 1, not 1.0"),
        (["--model", "m", "--precision", "bf61"], 'unknown "bf61"; did you mean "bf16"?'),
        (["--model", "m", "--rule", "tie"], 'server.rule: unknown "tie"; did you mean "ties"?'),
        (["--model", "m", "--unit", "percent"], "server.unit: unknown"),
        (["--num-cleints", "3"], "No such option"),
        (["a.yaml", "--config", "b.yaml"], "config is given twice"),
    ],
)
def test_a_mistake_is_named(args: list[str], told: str):
    result, seen = run(*args)
    assert result.exit_code != 0
    assert told in f"{result.output} {result.exception}"
    assert not seen
