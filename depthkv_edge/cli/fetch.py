"""`depthkv-edge fetch`."""

from __future__ import annotations

import click

from depthkv_edge import assets
from depthkv_edge.cli.streams import echo_json
from depthkv_edge.errors import DepthKVError
from depthkv_edge.units import mib


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the path of each, by name.")
def fetch(names: tuple[str, ...], as_json: bool) -> None:
    """Fetch models and texts into the cache, and print their paths.

    Whatever needs one fetches it; this is for a machine that will have no network. Without a NAME, list what there is.
    """
    for name in names:
        if name not in assets.ASSETS:
            raise DepthKVError(f"there is no {name} to fetch: give one of {', '.join(assets.ASSETS)}")
    if not names and not as_json:
        for asset in assets.ASSETS.values():
            where = asset.path if asset.is_cached else "not in the cache"
            click.echo(f"{asset.name:<12}{mib(asset.n_bytes):>7} MiB  {asset.license:<20}{where}")
        return
    chosen = [assets.ASSETS[name] for name in names] or [asset for asset in assets.ASSETS.values() if asset.is_cached]
    paths = {asset.name: str(assets.fetch(asset)) for asset in chosen}
    if as_json:
        echo_json(paths)
    else:
        for path in paths.values():
            click.echo(path)
