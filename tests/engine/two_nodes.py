"""Lets two nodes of a Ray cluster on this machine, each with its own cache, fetch one store; prints their results.

Arguments: path of the store, and a folder for the caches.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from vllm_specplug.ray import stores

NUM_ACTORS = 2


class CountingSource(stores.StoreSource):
    """Counts the chunks that nodes read."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__(paths)
        self.num_reads = 0

    def read(self, path: str, name: str, offset: int, num_bytes: int) -> bytes:
        self.num_reads += 1
        return super().read(path, name, offset, num_bytes)

    def count(self) -> int:
        return self.num_reads


class Replica:
    """Fetches a store as a replica does before its engine starts."""

    def place(self, config: dict[str, Any], source: Any) -> dict[str, Any]:
        from vllm_specplug.stores.datastore import Datastore

        stores.CHUNK_BYTES = 2**16
        try:
            placed = stores.placed(config, source)
        except stores.StoreError as error:
            return {"error": str(error)}
        assert placed is not None
        (path,) = placed["datastore"].values()
        tokens = Datastore.open(path).tokens
        return {"path": path, "names": list(placed["datastore"]), "inode": os.stat(path).st_ino, "tokens": len(tokens)}


def main(store: Path, caches: Path) -> dict[str, Any]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": NUM_ACTORS,
            "include_dashboard": False,
            "env_vars": {stores.CACHE_VARIABLE: str(caches / "one")},
        },
    )
    try:
        other = cluster.add_node(num_cpus=NUM_ACTORS, env_vars={stores.CACHE_VARIABLE: str(caches / "two")})
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        nodes = [ray.get_runtime_context().get_node_id(), other.node_id]
        config = stores.located({"method": "specplug", "datastore": str(store)})
        stores.StoreSource = CountingSource  # type: ignore[misc]
        source = stores.start_source(config)
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        actors = [
            ray.remote(Replica).options(num_cpus=1, scheduling_strategy=On(node, soft=False)).remote()
            for node in nodes
            for _ in range(NUM_ACTORS)
        ]

        def place_all() -> list[dict[str, Any]]:
            configs: list[dict[str, Any]] = ray.get([actor.place.remote(config, source) for actor in actors])
            return configs

        where_it_is = place_all()
        # No node has the store at its path any more; the source still has it open.
        store.unlink()
        found = {"where it is": where_it_is, "fetched": place_all(), "reads": ray.get(source.count.remote())}
        # A truncated copy must be fetched again.
        cut = Path(found["fetched"][0]["path"])
        os.truncate(cut, 100)
        found["again"] = place_all()
        ray.kill(source)
        found["without source"] = ray.get(actors[0].place.remote(config, None))
        return found
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(*map(Path, sys.argv[1:]))))
