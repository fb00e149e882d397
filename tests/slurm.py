"""A SLURM of one machine for the tests: munged, slurmctld and slurmd on free ports, with all files in a folder."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from tests.s3_servers import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd")
_CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
SlurmdPort={node}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MailProg=/bin/true
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2,bf_interval=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE OverSubscribe=FORCE:4 State=UP
"""


def missing() -> str:
    """Why no SLURM can be started here; empty if it can."""
    if os.getuid() != 0:
        return "slurmd needs root rights"
    absent = [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


@contextmanager
def running_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start SLURM and give the environment of its commands; stop daemons and jobs in the end. One runs at a time."""
    with FileLock(Path(tempfile.gettempdir()) / "diffsmooth-tests-slurm.lock"):
        yield from _running_slurm(folder)


def _running_slurm(folder: Path) -> Iterator[dict[str, str]]:
    host, (controller, node) = socket.gethostname().split(".")[0], free_ports(2)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    text = _CONFIGURATION.format(host=host, controller=controller, node=node, folder=folder)
    (folder / "slurm.conf").write_text(text)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    options = [
        "key-file=munge.key",
        "socket=munge.socket",
        "pid-file=munge.pid",
        "log-file=munge.log",
        "seed-file=seed",
    ]
    munged = ["munged", "--foreground", "--force", *(f"--{one.replace('=', f'={folder}/')}" for one in options)]
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D"]):
            with (folder / f"{command[0]}.out").open("wb") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            if command is munged:
                wait_until(lambda: (folder / "munge.socket").exists(), "munged did not start")
        idle = ["sinfo", "--noheader", "--format=%t"]
        wait_until(lambda: output(idle, environment).strip() == "idle", "the node did not become idle")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        wait_until(lambda: not output(["squeue", "--noheader"], environment).strip(), "")
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=30)


def output(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout


def wait_until(reached, failure: str, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > limit:
            assert not failure, failure
            return
        time.sleep(0.2)
