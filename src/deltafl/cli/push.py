"""What `--push` does at the end of a command, and says in a dry run."""

from pathlib import Path

import click

from deltafl.merge.plan import Plan


def show_push(plan: Plan, name: str | None) -> None:
    """List what would go to the hub."""
    if name:
        from deltafl.merge.run import written_files  # torch

        click.echo(f"  push to {name}: {', '.join(written_files(plan))}")


def push_merged(folder: Path, name: str | None) -> None:
    """Upload a merged folder, if that is asked and there is one."""
    if name and folder.exists():
        from deltafl.checkpoints.hub import push  # heavy, and for the hub only

        click.echo(f"pushed: {push(folder, name)}")
