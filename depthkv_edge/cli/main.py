"""The `depthkv-edge` command."""

from __future__ import annotations

import sys

import click

from depthkv_edge import __version__
from depthkv_edge.cli.bench import bench
from depthkv_edge.cli.calibrate import calibrate
from depthkv_edge.cli.chat import chat
from depthkv_edge.cli.doctor import doctor
from depthkv_edge.cli.eval import evaluate
from depthkv_edge.cli.fetch import fetch
from depthkv_edge.cli.inspect import inspect
from depthkv_edge.cli.run import run
from depthkv_edge.cli.serve import serve
from depthkv_edge.cli.streams import StreamError, abandon_output, prepare_streams
from depthkv_edge.errors import DepthKVError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="depthkv-edge")
def cli() -> None:
    """Run a GGUF model in a KV cache that is smaller than its context."""


for command in (bench, calibrate, chat, doctor, evaluate, fetch, inspect, run, serve):
    cli.add_command(command)


def main() -> None:
    """Entry point: whatever a user can get wrong is one line on standard error, and exit code 2."""
    prepare_streams()
    try:
        try:
            cli(standalone_mode=False)
        finally:
            sys.stdout.flush()
    except (click.ClickException, DepthKVError) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo("depthkv-edge: " + " ".join(text.split()), err=True)
        if isinstance(error, StreamError):
            abandon_output()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:  # the reader has gone
        abandon_output()
        sys.exit(1)


if __name__ == "__main__":
    main()
