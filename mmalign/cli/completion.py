"""The `completion` command: the script that lets a shell complete words."""

import click
from click.shell_completion import get_completion_class

PROGRAM, VARIABLE = "mmalign", "_MMALIGN_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets a shell complete words.

    It completes commands, options and paths, once the shell reads it at each start:

    \b
    in ~/.bashrc                    eval "$(mmalign completion bash)"
    in ~/.zshrc, below compinit     eval "$(mmalign completion zsh)"
    in ~/.config/fish/config.fish   mmalign completion fish | source

    \b
    Example:  mmalign completion bash
    """
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"this version of click has no completion for {shell}", ctx)
    script = made(ctx.find_root().command, {}, PROGRAM, VARIABLE).source()
    # As bytes: a shell cannot read the line ends of Windows.
    click.echo(script.encode(), nl=False)
