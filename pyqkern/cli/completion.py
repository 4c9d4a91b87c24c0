"""`pyqkern completion`: the script with which a shell completes pyqkern's commands, options and files."""

import argparse
from pathlib import Path
from typing import Any

from pyqkern.cli.output import Output

HELP = "Prints a shell's completion script."
SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/pyqkern",
    "zsh": "a folder of $fpath, as _pyqkern",
    "fish": "~/.config/fish/completions/pyqkern.fish",
}
FOLDERS = ("MODEL", "FOLDER", "OUT")  # metavars of what is a folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = "; ".join(f"{shell}: {place}" for shell, place in SHELLS.items())
    parser.add_argument("shell", choices=list(SHELLS), help=f"write it to: {where}")


def run(options: argparse.Namespace, out: Output) -> None:
    """The script is made from the parser of all commands, so it is never out of date."""
    import shtab

    _mark_files(options.parser, shtab)
    out.say(shtab.complete(options.parser, options.shell))


def _mark_files(parser: argparse.ArgumentParser, shtab: Any) -> None:
    """Tells shtab which arguments are files and which are folders."""
    for action in parser._actions:
        marked: Any = action
        if action.metavar in FOLDERS:
            marked.complete = shtab.DIRECTORY
        elif action.type is Path:
            marked.complete = shtab.FILE
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _mark_files(subparser, shtab)
