"""The command `init`."""
import click


@click.command()
def init() -> None:
    """Write a recipe."""
