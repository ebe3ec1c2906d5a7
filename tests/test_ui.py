"""What a lab user sees: a finished run in Prefect's UI, in a real browser. The pictures lie in screenshots/."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import Browser, browser
from tests.making import write_pod5
from tests.servers import http_post, wait_until

SHOAL = Path(sys.executable).with_name("shoal")
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    with browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def flow_run(prefect_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Call a run, and return the id of its flow run."""
    folder = tmp_path_factory.mktemp("seen")
    for number in range(4):
        write_pod5(
            folder / "data" / f"{number}.pod5", [20_000] * 10, first=10 * number, seed=77, flow_cell_id="FAX77777"
        )
    command = [SHOAL, "run", folder / "data", "--out", folder / "out", "--engine", "null", "--batch-samples", "200000"]
    done = subprocess.run([*command, "--rate", "60000", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reads"] == 40
    named = {"flows": {"name": {"any_": ["basecall"]}}, "flow_runs": {"tags": {"all_": ["FAX77777"]}}}
    (run,) = http_post(f"{prefect_url}/flow_runs/filter", json=named).json()
    return str(run["id"])


def test_a_finished_run_is_legible(tab: Browser, flow_run: str, prefect_url: str) -> None:
    site = prefect_url.removesuffix("/api")
    tab.open(f"{site}/runs")
    tab.wait_for("FAX77777 sample 20261122")
    tab.screenshot("runs")
    tab.open(f"{site}/runs/flow-run/{flow_run}")
    seen = tab.wait_for("FAX77777 sample 20261122")
    assert "Completed" in seen
    tab.screenshot("flow-run")
    tab.press("Artifacts")
    seen = tab.wait_for("What came of the run")
    assert "What is in the input" in seen
    assert "40 of 40 reads" in seen
    tab.screenshot("flow-run-artifacts")


@pytest.mark.parametrize(
    ("key", "words"),
    [("plan", "FAX77777"), ("result", "N50"), ("progress", "Progress")],
)
def test_artifacts_are_shown(tab: Browser, flow_run: str, prefect_url: str, key: str, words: str) -> None:
    site = prefect_url.removesuffix("/api")
    wanted = {"artifacts": {"key": {"any_": [key]}}, "flow_runs": {"tags": {"all_": ["FAX77777"]}}}
    (artifact, *_) = http_post(f"{prefect_url}/artifacts/filter", json=wanted).json() or [None]
    assert artifact, f"there is no artifact {key}"
    tab.open(f"{site}/artifacts/artifact/{artifact['id']}")
    tab.wait_for(words)
    tab.screenshot(f"artifact-{key}")
    if key == "result":
        drawn = "i => i.src.startsWith('data:image/svg') && i.complete && i.naturalWidth > 100"
        wait_until(
            lambda: tab.value(f"[...document.images].filter({drawn}).length") == 2,
            seconds=300,
            telling=lambda: "the plots are not drawn",
        )
