"""Tell Ray when AWS announces the interruption of this spot node, so that no new actor is placed on it.

    python3 spot_watcher.py HEAD_IP:6379

The watcher runs on each worker node beside Ray. Every 5 s it asks the instance metadata service (IMDSv2) for
/latest/meta-data/spot/instance-action. The answer is 404 until AWS announces an interruption, two minutes ahead. The
watcher then calls `ray drain-node` once. Without it, an interrupted node costs the blocks in flight, which are computed
again. Only the standard library is imported; Ray is used through its command.

Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger(__name__)

_SERVICE = "http://169.254.169.254"
_TIMEOUT = 2.0
_TOKEN_SECONDS = 21600
_NOTICE_SECONDS = 120  # between AWS's notice and the interruption


class Metadata:
    """The instance metadata service. Its session token is renewed when the service rejects it."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint.rstrip("/")
        self._token = ""
        # 169.254.169.254 is never behind a proxy
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def notice(self) -> dict[str, str] | None:
        """The action that AWS announces, {"action": ..., "time": ...}, or None.

        Raises: OSError if the service does not answer.
        """
        for _ in range(2):
            if not self._token:
                self._token = self._request(
                    "PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
                )
            try:
                text = self._request(
                    "GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token}
                )
            except urllib.error.HTTPError as error:
                if error.code == 404:
                    return None
                if error.code != 401:
                    raise
                self._token = ""
            else:
                found = json.loads(text)
                return found if isinstance(found, dict) else {}
        return None

    def _request(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(self._endpoint + path, method=method, headers=headers)
        with self._open(request, timeout=_TIMEOUT) as answer:
            return str(answer.read().decode())


def seconds_left(notice: dict[str, str], now: datetime) -> int:
    """Seconds until the announced interruption, or the usual notice if its time cannot be parsed."""
    try:
        end = datetime.fromisoformat(notice["time"])
        return max(0, int((end - now).total_seconds()))
    except (KeyError, TypeError, ValueError):
        return _NOTICE_SECONDS


def find_node_id(address: str, proc: Path = Path("/proc")) -> str | None:
    """The id of this machine's node in the cluster at `address`, from the command line of its raylet.

    `ray drain-node` could find the id only by joining the cluster as a driver, which would take seconds of the notice.
    """
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # the process has ended
        if Path(words[0]).name != "raylet":
            continue
        flags = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--") and "=" in word)
        if flags.get("gcs-address") == address and flags.get("node_id"):
            return flags["node_id"]
    return None


def drain(address: str, node_id: str, notice: dict[str, str]) -> bool:
    """Call `ray drain-node`; returns whether Ray accepted it."""
    action = notice.get("action", "an action")
    command = ["ray", "drain-node", "--address", address, "--node-id", node_id]
    command += [
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        f"AWS announced {action} of this spot node",
    ]
    command += ["--deadline-remaining-seconds", str(seconds_left(notice, datetime.now(UTC)))]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.error("ray drain-node: %s", error)
        return False
    if ended.returncode:
        logger.error("ray drain-node ended with exit status %d: %s", ended.returncode, ended.stderr.strip()[-500:])
    return ended.returncode == 0


def watch(address: str, metadata: Metadata, interval: float) -> None:
    """Wait for the notice and drain this node, repeatedly until Ray accepts it."""
    silent = False
    while True:
        try:
            notice = metadata.notice()
            silent = False
        except (OSError, ValueError) as error:
            notice = None
            if not silent:
                logger.warning("the metadata service does not answer: %s", error)
            silent = True
        if notice is not None:
            node_id = find_node_id(address)
            if node_id is None:
                logger.error("AWS announced an interruption, but no raylet of the cluster at %s runs here", address)
            elif drain(address, node_id, notice):
                logger.warning("AWS will interrupt this node (%s); draining node %s", notice, node_id)
                return
        time.sleep(interval)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("address", help="address of the head's GCS, HOST:6379, the same as for `ray start --address`")
    parser.add_argument("--interval", type=float, default=5.0, help="seconds between requests (default 5)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s spot_watcher: %(message)s", stream=sys.stderr)
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") or _SERVICE
    watch(options.address, Metadata(endpoint), options.interval)


if __name__ == "__main__":
    main()
