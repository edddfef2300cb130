"""The command line: parse, call, show progress, print errors. Commands are imported when they are
used.
"""

import atexit
import gc
import importlib
import logging
import os
import sys
from collections.abc import Sequence

import click

from deltafl.errors import DeltaflError, did_you_mean
from deltafl.version import __version__

COMMANDS = {
    "quickstart": "The whole story offline in about a minute, with a report.",
    "finetune": "Fine-tune a model on a task.",
    "centralized": "Train on all samples in one place, what federated runs compare with.",
    "evaluate": "Accuracy of models on a task.",
    "merge": "Merge fine-tuned models of one base by one server step.",
    "extract": "Make a LoRA of a fine-tuned model.",
    "statistics": "What a merge by regmean or fisher needs of a task, to share in place of data.",
    "search": "Choose method and coefficients on validation data, then merge.",
    "inspect": "How much the fine-tunes differ: norms, cosines, signs, advice.",
    "shards": "Which client would hold which training samples.",
    "federate": "Federated training: rounds of local steps, each ended by one server step.",
    "mask": "Make or describe a mask: which coordinates would train.",
    "suite": "Federated runs compared: heterogeneity, local steps, masks, rules.",
    "recipe": "A file with every setting of a command, or its JSON schema.",
    "rules": "List every method with its parameters and traits.",
}
"""Name -> what it does; it is in the module of its name, centralized beside finetune."""

EXPERIMENTS = {
    "--heterogeneity-experiment": "heterogeneity",
    "--local-steps-experiment": "local-steps",
    "--compare-strategies": "mask-strategies",
}
"""Flag of `deltafl federate` -> the suite that it stands for, with the other options as they are.
"""


class LazyGroup(click.Group):
    """A group that knows its commands' names and imports a command when it is called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read `federate --compare-strategies ...` as `suite mask-strategies ...`."""
        suites = [EXPERIMENTS[arg] for arg in args if arg in EXPERIMENTS]
        if suites and "federate" in args:
            at = args.index("federate")
            rest = [arg for arg in args[at + 1 :] if arg not in EXPERIMENTS]
            args = [*args[:at], "suite", *suites, *rest]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of a first reading."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            raise click.UsageError(f'no command "{cmd_name}"; {did_you_mean(cmd_name, COMMANDS)}')
        module = "finetune" if cmd_name == "centralized" else cmd_name
        return vars(importlib.import_module(f"deltafl.cli.{module}"))[f"{cmd_name}_command"]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in the help text, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="deltafl")
@click.option("-v", "--verbose", is_flag=True, help="Log what the library does.")
def app(verbose: bool) -> None:
    """Merge fine-tuned models and run federated learning with one algebra of deltas."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="%(message)s", stream=sys.stderr
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit code 0: done; 1: failed; 2: bad input; 130: interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # a third of a second less: Python would search all of torch's modules for cycles
    atexit.register(gc.freeze)
    code = 0
    try:
        outcome = app.main(
            args=None if arguments is None else list(arguments), standalone_mode=False
        )
        code = outcome if isinstance(outcome, int) else 0
    except DeltaflError as error:
        click.echo(f"error: {error}", err=True)
        code = 2
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = f" (see {context.command_path} --help)" if context else ""
        click.echo(f"error: {error.format_message()}{hint}", err=True)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; nothing half-written is left", err=True)
        code = 130
    except OSError as error:
        where = f' "{error.filename}"' if error.filename else ""
        click.echo(f"error: cannot read or write{where}: {error.strerror or error}", err=True)
        code = 2
    sys.exit(code)
