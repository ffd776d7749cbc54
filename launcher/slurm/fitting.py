"""Whether a partition has what a run asks for, said before it waits for nodes that there are not. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from launcher.slurm.site import SiteConfig
from trainer.errors import LaunchError


def refuse_unfitting(site: SiteConfig, nodes: tuple[int, int], gpus_per_node: int, gpus: Mapping[str, int]) -> None:
    """Nodes of different kinds will do as long as enough of them have the GPUs.

    Args:
        nodes: fewest and most.
        gpus: of each node of the partition (`scheduler.gpus_by_node`).

    Raises:
        LaunchError: fewer than the fewest have enough.
    """
    usable = {node: count for node, count in gpus.items() if node not in site.exclude}
    enough = sum(count >= gpus_per_node for count in usable.values())
    if enough >= nodes[0]:
        return
    kinds = Counter(usable.values())
    there = ", ".join(f"{_count(kinds[count], 'node')} with {count or 'none'}" for count in sorted(kinds, reverse=True))
    partition = f"partition {site.partition}" if site.partition else "the default partition"
    raise LaunchError(
        f"{_count(nodes[0], 'node')} with {_count(gpus_per_node, 'GPU')} each {'is' if nodes[0] == 1 else 'are'} asked "
        f"for, and {partition} has {enough or 'none'} ({there or 'it has no nodes'}): lower cluster.ranks_per_node or "
        "--nodes, or name another partition in the site file"
    )


def refuse_unmounted(site: SiteConfig, paths: Mapping[str, Path]) -> None:
    """What ranks in a container read and write must be there under the same path as outside.

    Args:
        paths: absolute, by what they are for: `{"the run": …, "prepared data": …}`.

    Raises:
        LaunchError: no mount shows one of them. Apptainer shows some folders by itself, and is not asked.
    """
    if site.container is None or site.container.kind != "pyxis":
        return
    mounts = [mount.split(":") for mount in site.container.mounts]
    shown = [Path(outside) for outside, *inside in mounts if not inside or inside[0] == outside]
    for what, path in paths.items():
        if not any(path.is_relative_to(folder) for folder in shown):
            raise LaunchError(
                f"container.mounts: none of them shows {path} ({what}) at the same path inside; add "
                f"{str(path.parent)!r}"
            )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
