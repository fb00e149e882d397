"""One run through the failures of a cloud, compared with the votes of an undisturbed run.

    python -m tests.chaos --seed 0 --store s3

The test starts a Ray cluster of several nodes with logical GPUs, a server of S3, Google Cloud Storage or Azure behind a
proxy that fails some calls and drops some responses, and two drivers on the same run. At numbers of blocks that the
seed chooses, it kills actors with -9, removes, adds and drains nodes, and kills and restarts a driver. At the end every
block must exist once, and the votes must equal those of an undisturbed worker. The report is printed as JSON.
"""

import os

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

import argparse
import io
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ray.cluster_utils import Cluster

from diffsmooth.pipeline.certify.orders import OrderKeys, order_of
from diffsmooth.pipeline.spec import RunSpec, load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import list_blocks, read_votes
from tests.cloud_servers import StoreServer, find_azurite, find_gcs, start_azure, start_gcs
from tests.models import make_run, png, to_toml
from tests.processes import starting_ray, worker_actors
from tests.s3_servers import faulty, find_weed, moto_server, seaweed_server, with_bucket

ROOT = Path(__file__).parent.parent
SAMPLES, BATCH = 16, 16
FAILED_SHARE, DROPPED_SHARE = 0.05, 0.05


def make_spec(folder: Path) -> RunSpec:
    """Sixteen images for the half-space classifier, at about 500 draws per second and actor: 96 blocks."""
    images = [png(np.full((4, 4), 100 + 55 * (index % 2), np.uint8)) for index in range(SAMPLES)]
    pq.write_table(
        pa.table({"image": images, "label": [index % 2 for index in range(SAMPLES)]}), folder / "images.parquet"
    )
    return load_spec(
        {
            "name": "chaos",
            "data": {"name": "parquet", "path": str(folder / "images.parquet")},
            "classifier": {"arch": "tests.models:slow_half_space"},
            "smoothing": {"sigma": 0.25, "n0": 50, "n": 500, "block": {"selection": 50, "estimation": 100}},
            "compute": {"device": "auto"},
        }
    )


class Faults:
    """Decides which calls of the store fail, from a random stream of its own."""

    def __init__(self, seed: int) -> None:
        self._rng, self._lock = np.random.default_rng([seed, 1]), threading.Lock()
        self.counts: Counter[str] = Counter()

    def __call__(self, method: str, path: str, number: int) -> Any:
        with self._lock:
            value = self._rng.random()
        if value < FAILED_SHARE:
            self.counts["calls failed"] += 1
            return 503, "SlowDown"
        if value < FAILED_SHARE + DROPPED_SHARE and method == "PUT":
            self.counts["responses dropped"] += 1
            return "drop"
        return None


class Chaos:
    """The cluster, the drivers, and the failures that they suffer."""

    def __init__(self, spec: RunSpec, home: str, folder: Path, log: Path, rng: np.random.Generator) -> None:
        head = {"num_cpus": 1, "num_gpus": 0, "object_store_memory": 80 * 1024**2, "include_dashboard": False}
        with starting_ray():
            self.cluster = Cluster(initialize_head=True, head_node_args=head)
            self.nodes = [self.new_node() for _ in range(2)]
        (folder / "spec.toml").write_text(to_toml(spec))
        self.command = [
            sys.executable,
            "-m",
            "diffsmooth.jobs.cli",
            "certify",
            str(folder / "spec.toml"),
            "--out",
            home,
        ]
        self.command += ["--address", self.cluster.address, "--actors", "2", "--batch-size", str(BATCH), "--json"]
        self.log, self.rng = log.open("wb"), rng
        self.drivers = [self.new_driver() for _ in range(2)]
        self.done: Counter[str] = Counter()

    def new_node(self) -> Any:
        return self.cluster.add_node(num_cpus=2, num_gpus=2, object_store_memory=80 * 1024**2)

    def new_driver(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self.command, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.log)

    def kill_actor(self) -> None:
        limit = time.monotonic() + 20
        while not (actors := worker_actors()) and time.monotonic() < limit:
            time.sleep(0.1)
        if actors:
            os.kill(int(self.rng.choice(actors)), signal.SIGKILL)
            self.done["actors killed"] += 1

    def remove_node(self) -> None:
        self.cluster.remove_node(self.nodes.pop(int(self.rng.integers(len(self.nodes)))), allow_graceful=False)
        self.done["nodes removed"] += 1

    def add_node(self) -> None:
        self.nodes.append(self.new_node())
        self.done["nodes added"] += 1

    def drain_node(self) -> None:
        """A spot notice: the node is drained, idle actors leave it, it is removed, and another node replaces it."""
        self.add_node()
        node, before = self.nodes.pop(0), self.moved()
        ray_cli = Path(sys.executable).with_name("ray")
        command = [str(ray_cli), "drain-node", "--address", self.cluster.address, "--node-id", node.node_id,
                   "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
                   "--deadline-remaining-seconds", "20"]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        limit = time.monotonic() + 20
        while self.moved() == before and time.monotonic() < limit:
            time.sleep(0.2)
        self.cluster.remove_node(node, allow_graceful=False)
        self.done["nodes drained"] += 1

    def moved(self) -> int:
        """How many actors have left a node that is being drained."""
        return Path(self.log.name).read_text().count("moving its actor to another node")

    def kill_driver(self) -> None:
        index = int(self.rng.integers(len(self.drivers)))
        if self.drivers[index].poll() is None:
            self.done["drivers killed"] += 1
        self.drivers[index].kill()
        self.drivers[index].communicate()
        self.drivers[index] = self.new_driver()

    def close(self) -> None:
        for driver in self.drivers:
            driver.kill()
        self.cluster.shutdown()
        self.log.close()


@contextmanager
def start_s3(folder: Path) -> Iterator[StoreServer]:
    weed = find_weed()
    with seaweed_server(weed, folder) if weed else moto_server() as url, with_bucket(url):
        yield StoreServer(scheme="s3", url=url)


def installed(binary: Path | None) -> Path:
    return binary or sys.exit("the server of this store is not installed")


STORES: dict[str, Callable[[Path], AbstractContextManager[StoreServer]]] = {
    "s3": start_s3,
    "gs": lambda folder: start_gcs(installed(find_gcs()), folder),
    "az": lambda folder: start_azure(installed(find_azurite()), folder),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=list(STORES), default="s3")
    arguments = parser.parse_args()
    seed = arguments.seed
    rng = np.random.default_rng([seed, 0])
    started = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "store").mkdir()
        server = stack.enter_context(STORES[arguments.store](folder / "store"))
        faults = Faults(seed)
        os.environ |= server.environment(stack.enter_context(faulty(server.url, faults)))
        spec, home = make_spec(folder), f"{server.scheme}://bucket/chaos"
        wanted = list(order_of(spec, range(SAMPLES)).blocks(spec.smoothing.block))
        chaos = Chaos(spec, home, folder, folder / "drivers.log", rng)
        stack.callback(chaos.close)

        store = open_store(home)
        events = [chaos.kill_actor] * 3 + [chaos.remove_node, chaos.add_node, chaos.drain_node, chaos.kill_driver]
        events = [events[index] for index in rng.permutation(len(events))]
        points = sorted(int(at) for at in rng.integers(4, int(0.8 * len(wanted)), len(events)))
        for event, point in zip(events, points, strict=True):
            limit = time.monotonic() + 180
            while len(list_blocks(store, spec.smoothing.block)) < point:
                if time.monotonic() > limit or all(driver.poll() not in (None, 0) for driver in chaos.drivers):
                    sys.exit(f"no progress before {event.__name__}: {(folder / 'drivers.log').read_text()[-4000:]}")
                time.sleep(0.2)
            event()
        results = [driver.communicate(timeout=300)[0] for driver in chaos.drivers]
        statuses = [driver.returncode for driver in chaos.drivers]
        if statuses != [0, 0] or not all(result.startswith(b"[") for result in results):
            sys.exit(f"exit statuses {statuses}, {results}: {(folder / 'drivers.log').read_text()[-4000:]}")

        os.environ |= server.environment()
        store = open_store(home)
        undisturbed = make_run(spec, folder / "undisturbed", SAMPLES)
        answers = [json.loads(result)[0] for result in results]
        ours, expected = read_votes(home), read_votes(undisturbed.uri)
        keys = [entry.key for entry in store.list("votes")]
        certificates = pd.read_parquet(io.BytesIO(store.read(OrderKeys("001").certificates)))
        report = {
            "seed": seed,
            "store": arguments.store,
            "events": {at: event.__name__ for event, at in zip(events, points, strict=True)},
            **chaos.done,
            "actors moved off a draining node": chaos.moved(),
            **faults.counts,
            "blocks": len(wanted),
            "objects": len(keys),
            "objects_once": len(set(keys)) == len(keys),
            "computed_twice_and_dropped": sum(answer.get("blocks_computed_twice", 0) for answer in answers),
            "attempts_lost": sum(answer.get("tasks_lost", 0) for answer in answers),
            "rows": len(expected),
            "rows_equal": ours.equals(expected),
            "complete": all(answer["complete"] for answer in answers),
            "certified": int(certificates["status"].eq("certified").sum()),
            "seconds": round(time.monotonic() - started, 1),
        }
    print(json.dumps(report))  # noqa: T201
    sys.exit(0 if report["rows_equal"] and report["complete"] and report["objects"] == len(wanted) else 1)


if __name__ == "__main__":
    main()
