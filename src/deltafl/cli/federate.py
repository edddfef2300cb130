"""`deltafl federate`."""

from deltafl.cli.command import flag, recipe_command
from deltafl.cli.progress import drawn_progress
from deltafl.cli.run import finish, prepared
from deltafl.federated import FederatedRecipe, federate
from deltafl.federated.run import check_run


@recipe_command(FederatedRecipe, "tensorboard", "resume", "dry_run", "quiet")
def federate_command(recipe: FederatedRecipe) -> None:
    """Federated training of a pre-trained model, test once, write the best model and report.html.

    With --heterogeneity-experiment, --local-steps-experiment or --compare-strategies it is `deltafl
    suite` with heterogeneity, local-steps or mask-strategies.

    \b
    deltafl federate --model M --data cifar100 --sharding non_iid --nc 5 --out DIR
    """
    net, task = prepared(recipe, lambda task: check_run(task, recipe))
    with drawn_progress() as show:
        done = federate(net, task, recipe, resume=flag("resume"), on_progress=show)
    finish(done)
