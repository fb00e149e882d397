"""`diffsmooth completion`."""

import click
from click.shell_completion import get_completion_class


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print a script that lets SHELL complete commands, options and shipped specs.

    \b
    diffsmooth completion bash >> ~/.bashrc
    diffsmooth completion zsh >> ~/.zshrc
    diffsmooth completion fish > ~/.config/fish/completions/diffsmooth.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(context.find_root().command, {}, "diffsmooth", "_DIFFSMOOTH_COMPLETE").source())
