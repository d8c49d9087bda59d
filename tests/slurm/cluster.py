"""A real Slurm on virtual hosts, and sshd on them where a test asks for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.slurm.hosts import Hosts, wait_until

_CONFIG = """\
ClusterName=growth
SlurmctldHost={head}({address})
SlurmUser=root
SlurmdUser=root
# A requeued job waits until its credential has expired: 120 s by default.
AuthInfo=cred_expire=5
StateSaveLocation=/mnt/cluster/state
SlurmdSpoolDir=/run/slurm/spool
SlurmctldPidFile=/run/slurm/slurmctld.pid
SlurmdPidFile=/run/slurm/slurmd.pid
SlurmctldLogFile=/mnt/cluster/slurmctld.log
SlurmdLogFile=/mnt/cluster/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
# A node that was off comes back by itself, and one that is silent is given up soon.
ReturnToService=2
SlurmdTimeout={silent_s}
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=2
EnforcePartLimits=ALL
JobCompType=jobcomp/filetxt
JobCompLoc=/mnt/cluster/jobcomp.txt
KillWait=5
# Jobs that are over are asked about however long other tests take: by default they are forgotten after 300 s.
MinJobAge=86400
NodeName={nodes} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""

_FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}


def why_no_cluster() -> str | None:
    """What Slurm needs and this machine lacks; None: nothing."""
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "srun", "munged", "mpirun") if not shutil.which(tool)]
    return f"not installed: {', '.join(missing)} (tools/setup.sh test installs them where it can)" if missing else None


class Cluster:
    """Slurm with a head that jobs are submitted from and nodes n1 … nN of 4 processors.

    Args:
        num_nodes: N.
        folder: on a file system that the hosts share; nothing else may be in it.
        environment: of all commands.
        silent_s: after how long a node that does not answer is given up.
        shared: folders that all hosts see, also below /tmp, /run and /dev/shm.
    """

    def __init__(
        self,
        num_nodes: int,
        folder: Path,
        environment: Mapping[str, str],
        silent_s: int = 30,
        shared: Sequence[Path] = (),
    ) -> None:
        self.folder, self.silent_s = folder, silent_s
        self.nodes = tuple(f"n{k + 1}" for k in range(num_nodes))
        environment = {**environment, "SLURM_CONF": "/mnt/cluster/slurm.conf"}
        self.hosts = Hosts(("head", *self.nodes), folder, environment, shared)

    def __enter__(self) -> Cluster:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # nothing is looked for
        config = _CONFIG.format(
            head="head",
            address=self.hosts.address("head"),
            silent_s=self.silent_s,
            nodes=f"n[1-{len(self.nodes)}]",
        )
        (self.folder / "slurm.conf").write_text(config)
        self.hosts.__enter__()
        try:
            self._start("head", "slurmctld")
            for node in self.nodes:
                self._start(node, f"slurmd -N {node}")
            self.wait_until_idle()
        except BaseException:
            self.hosts.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hosts.close()

    def _start(self, host: str, daemon: str) -> None:
        munged = (
            "munged --force --key-file=/mnt/cluster/munge.key --log-file=/run/munge/log "
            "--pid-file=/run/munge/pid --seed-file=/run/munge/seed"
        )
        # A daemon holds on to no pipe of ours: we would wait for its end.
        self.hosts.run(host, "sh", "-c", f"{munged} && exec {daemon}", quiet=True).check_returncode()

    def wait_until_idle(self, timeout_s: float = 1200) -> None:
        """All nodes are up and have nothing to do."""

        def idle() -> bool:
            said = self.run("sinfo", "--noheader", "--states=idle", "--format=%D").stdout.strip()
            return said == str(len(self.nodes))

        wait_until(idle, f"{len(self.nodes)} idle nodes: {self.run('sinfo').stdout}", timeout_s, 0.4)

    def run(self, *words: str, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run words on the head, in a folder, with more environment."""
        return self.hosts.run("head", *words, cwd=cwd, variables=variables)

    def revive(self, node: str) -> None:
        """Power a node on and start its daemons."""
        self.hosts.power_on(node)
        self._start(node, f"slurmd -N {node}")
        self.wait_until_idle()

    def job(self, job_id: int) -> dict[str, str]:
        """Return what scontrol shows of a job."""
        report = self.run("scontrol", "--oneliner", "show", "job", str(job_id)).stdout
        return dict(re.findall(r"(\w+)=(\S*)", report))

    def wait_for(self, job_id: int, *states: str, timeout_s: float = 1200) -> dict[str, str]:
        """Wait until a job is in one of some states; without any, until it is over.

        Raises:
            TimeoutError: it did not come to that.
        """
        wanted, deadline = set(states) or _FINAL, time.monotonic() + timeout_s
        while (job := self.job(job_id)).get("JobState") not in wanted:
            if time.monotonic() > deadline:
                queue = self.run("squeue", "--states=all").stdout
                raise TimeoutError(f"job {job_id} is {job.get('JobState')} after {timeout_s:g} s\n{queue}")
            time.sleep(0.4)
        return job

    def start_ssh(self) -> None:
        """Let root go from any host to any other by ssh; keys and settings end with the hosts."""
        keys = self.folder / "ssh"
        keys.mkdir(mode=0o700)
        for name in ("id", "host"):
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(keys / name)]
            subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
        (keys / "ssh_config").write_text(
            "Host *\nIdentityFile /etc/ssh/id\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        (keys / "sshd_config").write_text(
            "HostKey /etc/ssh/host\nAuthorizedKeysFile /etc/ssh/id.pub\nStrictModes no\nUsePAM no\nUseDNS no\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nPidFile /run/sshd.pid\n"
        )
        own = "mount -t tmpfs -o mode=755 none /etc/ssh && cp /mnt/cluster/ssh/* /etc/ssh/"
        start = "chmod 600 /etc/ssh/id /etc/ssh/host && /usr/sbin/sshd"
        for host in self.hosts.names:
            self.hosts.run(host, "sh", "-c", f"{own} && {start}", quiet=True).check_returncode()
