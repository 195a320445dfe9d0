"""For tests on real clusters: the model they use, and a `ray start --head` of their own."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def model_folder(place: Path) -> str:
    """`embedded` if its weights exist, else an untrained model of the same shape in `place`."""
    from envs.embedded import folder
    from envs.errors import UserError

    try:
        folder()
        return "embedded"
    except UserError:
        pass

    from envs.model.config import AdaptiveMolmoEConfig
    from recipes.embedded_model.fresh_weights import initialise
    from recipes.embedded_model.shape import write_files

    place.mkdir(parents=True, exist_ok=True)
    write_files(place)
    model = initialise(AdaptiveMolmoEConfig.from_pretrained(place), 0)
    model.half().save_pretrained(place)
    (place / "importance.json").write_text(json.dumps({"importance": [float(i) for i in range(16, 0, -1)]}))
    return str(place)


def free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Head:
    """A head node with job server, in a process group and a folder of its own."""

    def __init__(self, cpus: int = 2) -> None:
        # Ray's sockets are below it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="rc-", dir="/tmp"))
        gcs, dashboard, client, agent, metrics = free_ports(5)
        self.address, self.jobs = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        environment["RAY_worker_niceness"] = "0"  # tests share their machine with others
        environment.pop("RAY_ADDRESS", None)
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        self.log = (self.folder / "start.log").open("w")
        self.process = subprocess.Popen(
            [
                BIN / "ray", "start", "--head", "--block", f"--port={gcs}", "--node-ip-address=127.0.0.1",
                f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={client}",
                f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", f"--num-cpus={cpus}",
                "--object-store-memory=120000000", f"--temp-dir={self.folder / 'ray'}",
            ],
            stdout=self.log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip

    def wait(self, timeout_s: float = 120.0) -> "Head":
        """Returns when the job server answers."""
        deadline = time.monotonic() + timeout_s
        port = int(self.jobs.rpartition(":")[2])
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return self
            time.sleep(0.5)
        text = (self.folder / "start.log").read_text()
        self.stop()
        pytest.fail(f"ray start did not come up within {timeout_s:g} s:\n{text}")

    def stop(self) -> None:
        """Ends the node's processes and removes its folder."""
        for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
                break
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)
