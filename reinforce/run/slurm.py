"""launch.sh as the batch script of a Slurm hetjob: group 0 serves the reward, group 1 trains.

Facts that the code rests on:
- Slurm runs a copy of the batch script.
- `--signal=B:USR1` reaches the batch script alone.
- srun passes SIGUSR1 to every process of its step, and kills the step at SIGTERM.
- srun takes a lone ":" among its words for the start of another component.
Only the standard library is imported, for any Python from 3.8 on.
"""

from __future__ import annotations

import os
import secrets
import shlex
import subprocess
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from reinforce.run.children import EndedError


def is_hetjob() -> bool:
    """Whether this process is the batch script of a hetjob with a second group of nodes."""
    return bool(os.environ.get("SLURM_JOB_ID") and os.environ.get("SLURM_JOB_NODELIST_HET_GROUP_1"))


def hosts_of(nodelist: str) -> list[str]:
    """The hosts of "gpu[03-05]". Raises EndedError if scontrol names none."""
    command = ["scontrol", "show", "hostnames", nodelist]
    try:
        shown = subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout.decode()
    except OSError as error:
        raise EndedError(1, f"scontrol cannot be started: {error.strerror}") from error
    if not shown.split():
        raise EndedError(1, f"scontrol names no host of '{nodelist}'")
    return shown.split()


class Hetjob:
    """The two groups of the hetjob whose batch script this process is."""

    def __init__(self) -> None:
        """Read the variables of Slurm. Raises EndedError if scontrol does not know the hosts."""
        self.id = os.environ["SLURM_JOB_ID"]
        self.server_host = hosts_of(os.environ["SLURM_JOB_NODELIST_HET_GROUP_0"])[0]
        self.actor_hosts = hosts_of(os.environ["SLURM_JOB_NODELIST_HET_GROUP_1"])

    def srun(self, group: int) -> list[str]:
        """The words that start one task on each node of a group, those of SRUN_ARGS included."""
        nodes = len(self.actor_hosts) if group else 1
        words = ["srun", f"--het-group={group}", f"--nodes={nodes}", "--ntasks-per-node=1"]
        if group:
            words.append("--kill-on-bad-exit=1")
        if cpus := os.environ.get(f"SLURM_CPUS_PER_TASK_HET_GROUP_{group}"):
            words.append(f"--cpus-per-task={cpus}")
        return words + shlex.split(os.environ.get("SRUN_ARGS", ""))

    def rendezvous(self) -> list[str]:
        """Flags of torchrun: its agents meet at the first host of group 1, at a port of the job."""
        port = 20000 + int(self.id) % 10000
        return [
            f"--nnodes={len(self.actor_hosts)}",
            "--rdzv-backend=c10d",
            f"--rdzv-id={self.id}",
            f"--rdzv-endpoint={self.actor_hosts[0]}:{port}",
        ]

    def processes(self) -> str:
        """The value of --nproc-per-node: the GPUs of a node by Slurm, or "gpu", all there are."""
        return os.environ.get("SLURM_GPUS_PER_NODE_HET_GROUP_1", "gpu").rpartition(":")[2]

    def cpus(self) -> int | None:
        """CPUs of an actor node: 32 of "32(x2),16"; None if Slurm names no number."""
        given = os.environ.get("SLURM_JOB_CPUS_PER_NODE_HET_GROUP_1", "")
        first = given.split("(")[0].split(",")[0]
        return int(first) if first.isdigit() else None

    def requeue(self) -> str:
        """Put the job back into the queue; why that failed, or "" if it did not."""
        try:
            code = subprocess.run(["scontrol", "requeue", self.id], check=False).returncode
        except OSError as error:
            return f"scontrol cannot be started: {error.strerror}"
        return f"scontrol requeue ended with code {code}" if code else ""


def write_token(file: Path) -> None:
    """Write a random token for both jobs to a new file that its owner alone can read."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
        out.write(secrets.token_hex(32))


def refuse_lone_colon(words: Sequence[str]) -> None:
    """Raise EndedError if the words hold a lone ":", which srun would not pass on."""
    if ":" in words:
        i = list(words).index(":")
        before = words[i - 1] if i else "--flag"
        raise EndedError(2, f"srun would end its command at a lone ':'; write {before}=:")


def is_healthy(host: str, port: str) -> bool:
    """Whether GET /health answers 200; it is asked directly, never through a proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
