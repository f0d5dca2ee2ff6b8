#!/usr/bin/env python3
"""Prints docs/commands.md, from the help of every command."""

from __future__ import annotations

import click

from depthkv_edge.cli.main import cli

_WIDTH = 110


def main() -> None:
    print("# All commands\n")
    print("Written by `.venv/bin/python scripts/commands-page.py > docs/commands.md` from what `--help` says.")
    for name, command in sorted(cli.commands.items()):
        context = click.Context(command, info_name=f"depthkv-edge {name}", terminal_width=_WIDTH)
        print(f"\n## {name}\n\n```text\n{command.get_help(context)}\n```")


if __name__ == "__main__":
    main()
