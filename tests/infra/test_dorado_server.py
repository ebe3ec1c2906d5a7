"""The basecall server of a node: started once, mended, ended however its workers end. The server is a stand-in."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from infra import dorado_server, node_folder
from infra.dorado_server import SharedServer, open_server, server_command, shared_folder
from infra.engines import launch_warnings
from infra.site import DoradoSite, Site
from tasks.core.errors import EngineError
from tasks.engines.dorado_server import AttachedServer, Served
from tasks.settings import EngineSettings
from tests import standins
from tests.infra.test_processes import gone

SETTINGS = EngineSettings(kind="dorado-server", model=standins.MODEL)

#: A worker of its own: opens its share, says where the server is, and waits.
WORKER = """
import sys, time
from pathlib import Path
from tests.infra.test_dorado_server import share
share(Path(sys.argv[1])).serve()
print("served", flush=True)
time.sleep(300)
"""


def share(folder: Path, **changes: Any) -> SharedServer:
    """Make one worker's share in the server of `folder`."""
    values: dict[str, Any] = {"start_within": 300, "restarts": 3, "back_off": 0.05, **changes}
    command = (str(standins.SERVER), "--port", str(folder / "s"), *values.pop("arguments", ()))
    return SharedServer(command, folder=folder / values.pop("node", "node"), log=folder / "log", **values)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that stand-in servers obey. They call nothing here, and are quick to start without an engine."""
    for name, value in standins.environment(standins.control(tmp_path, idle=True)).items():
        monkeypatch.setenv(name, value)
    yield tmp_path
    for start in starts(tmp_path):
        assert gone(start["pid"]), "a server is left over"


def starts(folder: Path) -> list[dict[str, Any]]:
    """Return what the servers that were started were told."""
    try:
        return [json.loads(line) for line in (folder / "started").read_text().splitlines()]
    except FileNotFoundError:
        return []


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_start_and_end(folder: Path) -> None:
    server = share(folder)
    served = server.serve()
    assert served == Served(f"ipc://{folder / 's'}", 1) == server.serve()
    (start,) = starts(folder)
    assert psutil.pid_exists(start["pid"])
    assert os.getpgid(start["pid"]) == start["pid"]
    server.close()
    server.close()
    assert gone(start["pid"])
    assert "a line before" in (folder / "log").read_text()


def test_one_server_for_all_workers_and_the_last_one_out_ends_it(folder: Path) -> None:
    workers = [share(folder) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert len(set(threads.map(SharedServer.serve, workers))) == 1
    (start,) = starts(folder)
    for worker in workers[:2]:
        worker.close()
    time.sleep(0.5)
    assert psutil.pid_exists(start["pid"])
    workers[2].close()
    assert gone(start["pid"])


def test_another_run_begins_where_one_just_ended(folder: Path) -> None:
    for number in range(2):
        server = share(folder)
        server.serve()
        server.close()
        assert gone(starts(folder)[number]["pid"])
    server = share(folder)
    server.serve()
    server.close()
    other = share(folder)  # at once: it takes the server over, or waits for its end and starts another
    with standins.imported():
        from tasks.engines.dorado_server import ask_server

        assert ask_server(other.serve().address, milliseconds=10_000).version
    other.close()


def test_killed_workers_leave_no_orphan(folder: Path) -> None:
    """Two workers in processes of their own share a server; the one that started it is killed, then the other."""
    workers = []
    for _ in range(2):
        worker = subprocess.Popen([sys.executable, "-c", WORKER, folder], stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "served\n"
        workers.append(worker)
    (start,) = starts(folder)
    workers[0].send_signal(signal.SIGKILL)
    workers[0].communicate()
    time.sleep(0.5)
    assert psutil.pid_exists(start["pid"])
    workers[1].send_signal(signal.SIGKILL)
    workers[1].communicate()
    assert gone(start["pid"])


def test_its_children_end_with_it(folder: Path) -> None:
    server = share(folder, arguments=("--child",))
    server.serve()
    child = int((folder / "child").read_text())
    assert psutil.pid_exists(child)
    server.close()
    assert gone(child)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
def test_a_killed_keeper_takes_the_server_along(folder: Path) -> None:
    server = share(folder)
    served = server.serve()
    keeper = json.loads((folder / "node" / "server.json").read_text())["keeper"]
    os.kill(keeper, signal.SIGKILL)
    assert gone(starts(folder)[0]["pid"])
    assert server.mend(served, stalled=False).generation == 2
    server.close()


def test_a_dead_server_is_started_again(folder: Path) -> None:
    server, other = share(folder), share(folder)
    first = server.serve()
    other.serve()
    os.kill(starts(folder)[0]["pid"], signal.SIGKILL)
    wait_until(lambda: gone(starts(folder)[0]["pid"]))
    second = server.mend(first, stalled=False)
    assert second.generation == 2
    assert other.mend(first, stalled=True) == second  # another worker has done it already
    assert len(starts(folder)) == 2
    server.close()
    other.close()


def test_a_stalled_server_is_started_again_and_a_living_one_is_not(folder: Path) -> None:
    server = share(folder)
    first = server.serve()
    assert server.mend(first, stalled=False) == first
    os.kill(starts(folder)[0]["pid"], signal.SIGSTOP)
    assert server.mend(first, stalled=True).generation == 2
    assert gone(starts(folder)[0]["pid"])
    server.close()


def test_restarts_are_bounded(folder: Path) -> None:
    server = share(folder, restarts=1)
    served = server.mend(server.serve(), stalled=True)
    with pytest.raises(EngineError, match=r"died or stalled 2 times; .* more than 1 times \(dorado\.restarts"):
        server.mend(served, stalled=True)
    server.close()


def test_a_server_that_does_not_start(folder: Path) -> None:
    standins.control(folder, no_start=True)
    server = share(folder, start_within=15)
    with pytest.raises(EngineError, match=r"not ready in 15 s(.|\n)*Unable to find chunk benchmarks"):
        server.serve()
    server.close()


def test_a_server_that_ends_as_it_starts(folder: Path) -> None:
    standins.control(folder, start_error=True)
    server = share(folder)
    with pytest.raises(EngineError, match=r"ended as it started(.|\n)*no CUDA device"):
        server.serve()
    server.close()


def test_no_program(folder: Path) -> None:
    server = SharedServer(("nowhere_server",), folder=folder / "n", log=folder / "log", start_within=60, restarts=1)
    with pytest.raises(EngineError, match=r"no program 'nowhere_server'.*dorado\.server.*dorado\.address"):
        server.serve()
    server.close()


def test_its_output_is_drained(folder: Path) -> None:
    """More than a pipe holds: a server whose output nobody reads stops at 64 kB."""
    standins.control(folder, chatter=100, idle=True)
    server = share(folder)
    with standins.imported():
        from tasks.engines.dorado_server import ask_server

        for _ in range(3):
            assert ask_server(server.serve().address, milliseconds=10_000).gpus == ("Stand In 100",)
    wait_until(lambda: (folder / "log").stat().st_size > 2_000_000)
    server.close()


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(dorado_server.socket, "gethostname", lambda: "gpu3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    site = DoradoSite(server="/opt/ont/bin/dorado_basecall_server", arguments=("--ipc_threads", "3"))
    assert " ".join(server_command(site, SETTINGS, Path("/logs"))) == (
        "/opt/ont/bin/dorado_basecall_server --port auto --device cuda:0,1 --log_path /logs/dorado.gpu3 "
        f"--model {standins.MODEL} --ipc_threads 3"
    )
    chosen = site.model_copy(update={"device": "cuda:1", "port": "5555", "models": tmp_path})
    (tmp_path / standins.MODEL).mkdir()
    assert " ".join(server_command(chosen, SETTINGS, Path("/logs"))).endswith(
        f"--port 5555 --device cuda:1 --log_path /logs/dorado.gpu3 --model {tmp_path / standins.MODEL} --ipc_threads 3"
    )


def test_attached(tmp_path: Path) -> None:
    server = open_server(DoradoSite(address="/tmp/a.sock"), SETTINGS, out=tmp_path, logs=tmp_path)
    assert isinstance(server, AttachedServer)
    assert server.serve() == Served("ipc:///tmp/a.sock")
    assert not list(tmp_path.iterdir())


def test_runs_have_servers_of_their_own() -> None:
    site = DoradoSite()
    assert shared_folder(site, Path("/a")) == shared_folder(site, Path("/a")) != shared_folder(site, Path("/b"))
    assert str(os.getuid()) in shared_folder(site, Path("/a")).name
    assert shared_folder(site, Path("/a")) != shared_folder(DoradoSite(device="cuda:1"), Path("/a"))


@pytest.fixture
def node(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a /tmp of its own, and without Slurm."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return folder


def open_in_job(folder: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: str, job: str = "", **site: Any) -> Any:
    """Open a share in the run's server as a worker of this job would."""
    with monkeypatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", gpus)
        if job:
            environment.setenv("SLURM_JOB_ID", job)
        return open_server(
            DoradoSite(server=str(standins.SERVER), start_within=300, **site), SETTINGS, out=folder / "out", logs=folder
        )


@pytest.mark.parametrize("places", [[("7", "0"), ("8", "0")], [("", "0"), ("", "1")]])
def test_jobs_on_a_node_have_servers_of_their_own(
    node: Path, monkeypatch: pytest.MonkeyPatch, places: list[tuple[str, str]]
) -> None:
    """On Slurm each may see its GPU as the first; without it, what they see tells them apart. Workers of one share."""
    (first, again), (other, _) = (
        [open_in_job(node, monkeypatch, job=job, gpus=gpus) for _ in range(2)] for job, gpus in places
    )
    served = [server.serve() for server in (first, again, other)]
    assert served[0] == served[1]
    assert served[0].address != served[2].address
    logs = {start["log_path"] for start in starts(node)}
    assert len(starts(node)) == 2
    assert len(logs) == len(list(node.glob("dorado_basecall_server.*.log"))) == (2 if places[0][0] else 1)
    again.close()
    first.close()
    assert gone(starts(node)[0]["pid"])
    assert psutil.pid_exists(starts(node)[1]["pid"])
    other.close()
    wait_until(lambda: not list(node.glob("shoal-*")))


def test_what_a_killed_job_left_is_removed_by_the_next_server(node: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, used, empty = (node_folder.node_folder(name) for name in ("left", "used", "empty"))
    empty.mkdir()
    os.close(node_folder.join(left))
    (left / "keeper.json").write_text("")  # cut short by a crash
    share = node_folder.join(used)
    server = open_in_job(node, monkeypatch, gpus="0", job="7")
    server.serve()
    assert not left.exists()
    assert not empty.exists()
    assert used.exists()
    os.close(share)
    server.close()


def test_who_waited_for_a_folder_that_goes_makes_another(tmp_path: Path) -> None:
    folder = tmp_path / "node"
    ending = node_folder.join(folder)
    fcntl.flock(ending, fcntl.LOCK_EX)
    with ThreadPoolExecutor(1) as threads:
        joined = threads.submit(node_folder.join, folder)
        time.sleep(0.2)  # it waits; did it not yet, the test would hold as well
        node_folder.remove(folder, ending)
        os.close(ending)
        share = joined.result(60)
    assert os.path.samestat(os.fstat(share), (folder / "users.lock").stat())
    node_folder.remove_unused(folder)  # somebody is there
    assert folder.exists()
    os.close(share)
    node_folder.remove_unused(folder)
    assert not list(tmp_path.iterdir())


def test_a_fixed_port_is_one_servers_at_a_time(folder: Path) -> None:
    """Two jobs of a node, on one socket: the second would take it from the first."""
    first = share(folder, port=str(folder / "s"))
    served = first.serve()
    second = share(folder, port=str(folder / "s"), node="other", port_within=0.1)
    with pytest.raises(EngineError, match=r"/s is taken on .*dorado\.port.*leave it out"):
        second.serve()
    second.close()
    assert first.mend(served, stalled=True).generation == 2  # its own port is not in its way
    patient = share(folder, port=str(folder / "s"), node="other", port_within=300)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(patient.serve)
        first.close()
        assert waiting.result(300).generation == 1
    patient.close()


def test_a_fixed_port_that_another_program_has(node: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = str(other.getsockname()[1])
        server = share(node, port=number, port_within=0.1)
        with pytest.raises(EngineError, match=rf"{number} is taken on .*dorado\.port.*leave it out"):
            server.serve()
        server.close()
    assert not starts(node)


def test_a_server_whose_worker_was_killed_as_it_waited_is_not_doubled(folder: Path) -> None:
    standins.control(folder, no_start=True, idle=True)
    server = share(folder)
    server._join()  # else all would be gone
    worker = subprocess.Popen([sys.executable, "-c", WORKER, folder], stdout=subprocess.DEVNULL)
    wait_until(lambda: len(starts(folder)) == 1 and (folder / "node" / "keeper.json").exists())
    worker.kill()
    worker.wait()
    standins.control(folder, idle=True)
    assert server.serve().generation == 2
    assert gone(starts(folder)[0]["pid"])
    server.close()


def test_a_log_that_is_full_does_not_end_the_server(folder: Path) -> None:
    share = node_folder.join(folder / "node")
    command = [
        sys.executable,
        "-m",
        "infra.dorado_keeper",
        folder / "node",
        "1",
        standins.SERVER,
        "--port",
        folder / "s",
    ]
    with Path("/dev/full").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as keeper:
        wait_until(lambda: (folder / "node" / "server.json").exists() or keeper.poll() is not None)
        assert keeper.poll() is None
        os.close(share)


def test_warnings_count_the_clients_of_one_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # a login node's
    few = SETTINGS.model_copy(update={"in_flight_samples": 5_000_000})
    cluster = Site.model_validate({"name": "c", "kind": "slurm", "split": {"maximum": 4}, "dorado": {"port": "5555"}})
    port, batch = launch_warnings(cluster, few)
    assert "up to 4 servers" in port
    assert "2 clients" in batch
    assert not launch_warnings(Site(name="m", workers=4), few)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert not launch_warnings(Site(name="m", workers=4), few)
    assert "2 clients" in launch_warnings(Site(name="m", workers=1), few)[0]
