"""`deltafl federate`."""

from deltafl.cli.command import dry_run, quiet, recipe_command, resume, tensorboard
from deltafl.cli.progress import drawn_progress
from deltafl.cli.run import finish, prepared
from deltafl.federated import FederatedRecipe, federate
from deltafl.federated.run import check_run


@recipe_command(FederatedRecipe)
@tensorboard
@resume
@dry_run
@quiet
def federate_command(
    recipe: FederatedRecipe, tensorboard: bool, resume: bool, dry_run: bool, quiet: bool
) -> None:
    """Federated training of a pre-trained model, test once, write the best model and report.html.

    With --heterogeneity-experiment, --local-steps-experiment or --compare-strategies it is `deltafl
    suite` with heterogeneity, local-steps or mask-strategies.

    \b
    deltafl federate --model M --data cifar100 --sharding non_iid --nc 5 --out DIR
    """
    net, task = prepared(
        recipe,
        resume=resume,
        dry_run=dry_run,
        tensorboard=tensorboard,
        check=lambda task: check_run(task, recipe),
    )
    with drawn_progress(quiet=quiet) as show:
        done = federate(net, task, recipe, resume=resume, on_progress=show)
    finish(done, quiet=quiet, tensorboard=tensorboard)
