"""Virtual hosts: process trees, each with its own network, host name, process ids, /tmp, /run and /dev/shm.

The first host's network holds the bridge that all of them hang on, so that the machine's own network
stays as it is. When the process that made the hosts ends, however it ends, the kernel ends them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

PRIVATE = ("/tmp", "/run", "/dev/shm")  # noqa: S108  # empty on every host at first; all else is shared
NAMESPACES = ("--net", "--uts", "--mount", "--ipc", "--pid")
_BOOT = Path(__file__).with_name("boot_host.sh")
_NETWORK = "10.91.0"


def why_no_hosts() -> str | None:
    """What keeps this machine from having virtual hosts; None: nothing does."""
    if os.geteuid() != 0:
        return "virtual hosts need root"
    for tool in ("unshare", "nsenter", "setpriv", "ip"):
        if not shutil.which(tool):
            return f"{tool} is not installed"
    if not Path(f"/proc/self/task/{os.getpid()}/children").exists():
        return "this kernel does not tell the children of a process"
    attempt = (
        'mount --make-rprivate / && mount -t tmpfs none /run && mount -t sysfs none /sys && hostname "$0" && '
        "ip link add eth0 type bridge && ip link add to-n1 type veth peer name n1 && ip link set to-n1 master eth0"
    )
    words = ["unshare", *NAMESPACES, "--mount-proc", "--fork", "sh", "-c", attempt, "probe"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


class Hosts:
    """A few virtual hosts; the first is the one that work is submitted from.

    Args:
        names: of the hosts.
        folder: for their logs; the hosts see it as /mnt/cluster too.
        environment: of all commands on them.
        shared: folders that every host sees although they are in /tmp, /run or /dev/shm. Folders elsewhere, which
            are shared in any case, may be among them.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, environment: Mapping[str, str], shared: Sequence[Path] = ()
    ) -> None:
        self.names, self.folder, self.environment = tuple(names), folder, dict(environment)
        self.shared = [str(place) for place in shared if any(place.is_relative_to(own) for own in PRIVATE)]
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        self._firsts: dict[str, int] = {}

    def address(self, name: str) -> str:
        """IPv4 address of a host."""
        return f"{_NETWORK}.{self.names.index(name) + 1}"

    def __enter__(self) -> Hosts:
        lines = ["127.0.0.1 localhost", *(f"{self.address(name)} {name}" for name in self.names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        try:
            for name in self.names:
                self._hold(name)
            for name in self.names:
                self._plug_in(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every host and all that runs on it."""
        for name in list(self._holders):
            self.power_off(name)

    def on(self, name: str, *words: str, cwd: Path | None = None) -> list[str]:
        """The command that runs words on a host."""
        target = ["nsenter", "--target", str(self._firsts[name]), *NAMESPACES]
        return [*target, f"--wdns={cwd or Path.cwd()}", "--", *words]

    def run(
        self,
        name: str,
        *words: str,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
        quiet: bool = False,
        timeout_s: float = 1200,
    ) -> subprocess.CompletedProcess[str]:
        """Run words on a host to their end.

        Args:
            name: of the host.
            words: the command.
            cwd: its working directory; None: this one.
            variables: put over the environment.
            quiet: what it says is not kept, and so no daemon that it leaves behind can keep us waiting.
            timeout_s: raises TimeoutExpired after that.
        """
        output = subprocess.DEVNULL if quiet else subprocess.PIPE
        return subprocess.run(
            self.on(name, *words, cwd=cwd),
            check=False,
            env={**self.environment, **(variables or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            text=True,
            timeout=timeout_s,
        )

    def power_off(self, name: str) -> None:
        """Kill all processes of a host at once, without a message to any other host."""
        holder, first = self._holders.pop(name), self._firsts.pop(name, None)
        if first is None:  # it never came so far
            holder.kill()
        elif holder.poll() is None:
            os.kill(first, signal.SIGKILL)
        holder.wait(timeout=20)

    def power_on(self, name: str) -> None:
        """A host that was powered off comes back, with nothing running."""
        self._hold(name)
        self._plug_in(name)

    def cable(self, name: str, *, plugged: bool) -> None:
        """Pull or plug the cable of a host other than the first."""
        self._ip(self.names[0], f"link set to-{name} {'up' if plugged else 'down'}")

    def _hold(self, name: str) -> None:
        """Start a host's first process; it and its holder end with this process."""
        hold = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--mount-proc", "--fork", "--kill-child=KILL"]
        with (self.folder / f"{name}.log").open("ab") as log:
            holder = subprocess.Popen(
                [*hold, "bash", str(_BOOT), name, str(self.folder), *self.shared],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._holders[name] = holder
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")

        def first() -> list[str]:
            if holder.poll() is not None:
                raise RuntimeError(f"{name} has ended with code {holder.returncode}: see {self.folder / name}.log")
            return children.read_text().split()

        wait_until(first, f"{name} has a first process: see {self.folder / name}.log")
        self._firsts[name] = int(first()[0])
        root = Path(f"/proc/{self._firsts[name]}/root")
        wait_until(
            lambda: first() and (root / "run/booted").exists(), f"{name} has booted: see {self.folder / name}.log"
        )

    def _plug_in(self, name: str) -> None:
        first, process = self.names[0], self._firsts[name]
        address = f"addr add {self.address(name)}/24 dev eth0"
        if name == first:
            self._ip(name, "link set lo up", "link add eth0 type bridge", address, "link set eth0 up")
            return
        self._ip(first, f"link add to-{name} type veth peer name eth0 netns {process}")
        self._ip(first, f"link set to-{name} master eth0 up")
        self._ip(name, "link set lo up", address, "link set eth0 up")

    def _ip(self, name: str, *lines: str) -> None:
        enter = ["nsenter", "--target", str(self._firsts[name]), "--net", "ip", "-batch", "-"]
        subprocess.run(enter, check=True, input="\n".join(lines) + "\n", text=True, timeout=20)


def wait_until(is_so: Callable[[], object], what: str, timeout_s: float = 120, every_s: float = 0.02) -> None:
    """Look again and again. Raises TimeoutError, saying what did not come."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(every_s)
