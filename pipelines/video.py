"""Two minutes of the real thing: a terminal, the report, MLflow, Prefect and the page of the service, filmed as they are used.

It wants a finished `make repro`. What it does to the project is what it shows: one rung is trained again, is killed, goes on, and ends in
the bytes that it had. Captions say what is seen, and where it is played faster.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.filming import HEIGHT, WIDTH, Camera, Terminal

LARGEST_BYTES = 5_000_000
READY_SECONDS = 240
QUESTIONS = ("What is Polo?", "What is Belize?")
KILLED_RUNG = "mlp"
KILLED_AFTER = 12  # seconds: the imports, and some hundred steps


@dataclass(frozen=True)
class Places:
    """Where what is shown can be reached."""

    site: str
    mlflow: str
    prefect: str
    service: str


def video(root: Path, out: Path) -> Path:
    """The walkthrough as a WebM at `out`. Raises ValueError where a tool, a server or the finished build is missing."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise ValueError("no playwright here; pip install 'llm-from-scratch[dev]' brings it") from None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="video_")))
        places = stack.enter_context(served(root))
        playwright = stack.enter_context(sync_playwright())
        try:
            path = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            raise ValueError(
                f"no Chromium here ({str(error).splitlines()[0]}); install chromium, or: playwright install chromium"
            ) from None
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        camera = Camera(page, folder)
        try:
            warm_up(page, places)
            camera.start()
            in_the_terminal(camera, root)
            in_the_browser(camera, places)
            camera.stop()
        except Error as error:
            raise ValueError(f"a scene is not as expected: {str(error).splitlines()[0]}; look at it in a browser") from None
        out.parent.mkdir(parents=True, exist_ok=True)
        camera.develop(out)
    if out.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"{out}: {out.stat().st_size:,} bytes, wanted at most {LARGEST_BYTES:,}; show less, or raise crf in filming.py")
    return out


def in_the_terminal(camera: Camera, root: Path) -> None:
    """A rebuild with nothing to do, where a model comes from, and a training that is killed and goes on."""
    terminal = Terminal(camera.page, root, os.environ)
    try:
        weights = f"artifacts/models/{KILLED_RUNG}/model.safetensors"
        served_model = json.loads((root / "reports" / "verdict.json").read_text(encoding="utf-8"))["served"]
        terminal.clear()
        camera.say("LLM from scratch: raw text becomes a model that answers over HTTP, by two commands.", 3)
        camera.say("The first is make repro. All is built already, so there is nothing to do.  (8× faster)")
        with camera.faster(8):
            terminal.run("make repro", 180)
        camera.say("The first is make repro. All is built already, so there is nothing to do.", 2)
        terminal.clear()
        camera.say("DVC knows what stands on what: this is what the search index is made of.  (3× faster)")
        with camera.faster(3):
            terminal.run("dvc dag index", 60)
        camera.say("DVC knows what stands on what: this is what the search index is made of.", 2)
        terminal.clear()
        camera.say("Where does the served model come from? Down to the archives, their sha256 and their licence.")
        with camera.faster(3):
            terminal.run(f"python -m stages whence {served_model} | cut -c1-136 | head -{30}", 120)
        camera.say("Where does the served model come from? Down to the archives, their sha256 and their licence.", 6)
        terminal.clear()
        camera.say("Kill it anywhere: the same command goes on, and ends in the same bytes.", 1)
        shutil.rmtree(root / "runs", ignore_errors=True)
        terminal.run(f"sha256sum {weights}", 20)
        with camera.faster(2):
            terminal.run(f"timeout -s KILL {KILLED_AFTER} python -m stages train {KILLED_RUNG}", 60)
        camera.say("Killed (SIGKILL). The same again:", 1.5)
        with camera.faster(2):
            terminal.run(f"python -m stages train {KILLED_RUNG}", 120)
        terminal.run(f"sha256sum {weights}", 20)
        camera.say("It went on from its last save, and the weights are the same, bit for bit.", 3.5)
    finally:
        terminal.close()


def in_the_browser(camera: Camera, places: Places) -> None:
    """The report, the runs side by side, the flow, and a question."""
    page = camera.page
    go(camera, f"{places.site}/reports/report.html", "h1")
    camera.say("The report is written by the run, and no number in it was typed.", 2)
    scroll(camera, 5)
    go(camera, f"{places.site}/docs/posts/nobody_pays_for_distance.html", "h1")
    camera.say("So are twelve weeks, the models' cards, and posts like this one.", 2)
    scroll(camera, 3)

    go(camera, compared(places.mlflow), "text=Parameters")
    camera.say("MLflow remembers every run: here the rungs side by side, on one ruler.", 3)
    scroll(camera, 3)

    go(camera, f"{places.prefect}/runs", "a[href*='flow-run']")
    camera.say("Prefect says when and where: a rebuild is a flow, with one task a node of the graph.", 3)
    with camera.off():
        page.locator("a[href*='flow-run']").first.click()
        page.wait_for_timeout(5000)
        camera.say("Prefect says when and where: a rebuild is a flow, with one task a node of the graph.")
    page.wait_for_timeout(4000)

    go(camera, f"{places.service}/ui/", "role=tab[name='Chat']")
    camera.say("The second command is make serve. The chat answers from passages, and shows them.", 1.5)
    chat(camera)
    camera.say("The second command is make serve. The chat answers from passages, and shows them.", 4)
    for name, button, shown, caption in (
        ("Completion", "Continue", ".token", "What were each token's chances?"),
        ("Attention", "Draw", "rect", "What does each head look at? Nobody sees the future."),
        ("Evolution", "Write", ".card p", "One prompt through every rung, from counting to chat."),
    ):
        page.get_by_role("tab", name=name, exact=True).click()
        camera.say(caption, 0.7)
        panel = page.get_by_role("tabpanel").filter(visible=True)
        panel.get_by_role("button", name=button).click()
        panel.locator(shown).last.filter(has_text=" ").or_(panel.locator(shown).first).first.wait_for()
        page.wait_for_timeout(4000)
    camera.say("make repro · make serve · make test", 3)


def chat(camera: Camera) -> None:
    """The first question whose answer cites a passage, the passage open."""
    panel = camera.page.get_by_role("tabpanel").filter(visible=True)
    for question in QUESTIONS:
        panel.get_by_role("textbox", name="Message").press_sequentially(question, delay=60)
        panel.get_by_role("button", name="Send").click()
        panel.get_by_test_id("bot").last.wait_for()
        camera.page.wait_for_timeout(2500)
        if (passage := panel.get_by_role("button", name="[1]")).count():
            passage.first.click()
            return


def go(camera: Camera, address: str, wanted: str) -> None:
    """A page, from when what is wanted of it is there."""
    with camera.off():
        camera.page.goto(address)
        camera.page.locator(wanted).first.wait_for(timeout=60_000)
        camera.page.wait_for_timeout(1500)
        camera.page.mouse.move(WIDTH / 2, HEIGHT / 2)


def scroll(camera: Camera, seconds: float) -> None:
    for _ in range(round(seconds * 5)):
        camera.page.mouse.wheel(0, 90)
        camera.page.wait_for_timeout(200)


def warm_up(page: Any, places: Places) -> None:
    """Pages that are slow the first time they are asked for."""
    for address in (compared(places.mlflow), f"{places.prefect}/runs", f"{places.service}/ui/"):
        page.goto(address)
        page.wait_for_timeout(3000)


def compared(mlflow: str) -> str:
    """The address at which MLflow compares the newest runs of the ladder's rungs. Raises ValueError where it has none."""
    experiments = asked(f"{mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 100})["experiments"]
    here = [experiment["experiment_id"] for experiment in experiments]
    wanted = {"experiment_ids": here, "filter": "attributes.run_name LIKE 'train@%'", "max_results": 100}
    runs: dict[str, Any] = {}
    for run in asked(f"{mlflow}/api/2.0/mlflow/runs/search", wanted).get("runs", []):
        runs.setdefault(run["info"]["run_name"], run["info"])
    if not runs:
        raise ValueError("MLflow has no run of a rung; make repro makes some")
    chosen = list(runs.values())[:6]
    ids = json.dumps([run["run_id"] for run in chosen])
    return f"{mlflow}/#/compare-runs?runs={ids}&experiments={json.dumps(sorted({run['experiment_id'] for run in chosen}))}"


def asked(address: str, body: Mapping[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


@contextmanager
def served(root: Path) -> Iterator[Places]:
    """The site, MLflow, Prefect and the service, each on a free port of the loopback, until the end."""
    python, ports = sys.executable, [free_port() for _ in range(4)]
    home = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{root}/var/mlflow.db",
        "PREFECT_HOME": f"{root}/var/prefect",
        "BENTOML_HOME": f"{root}/var/bentoml",
    }
    environment = {**home, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", **os.environ}
    store = environment["MLFLOW_TRACKING_URI"]
    subprocess.run([python, "-m", "mkdocs", "build", "--quiet"], cwd=root, env={**environment, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    commands = [
        [python, "-m", "http.server", str(ports[0]), "--bind", "127.0.0.1", "--directory", "var/site"],
        [python, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port", str(ports[1])],
        [python, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(ports[2])],
        [python, "-m", "pipelines", "serve", "--port", str(ports[3])],
    ]
    addresses = [f"http://127.0.0.1:{port}" for port in ports]
    checks = ("/index.html", "/health", "/api/health", "/readyz")
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            servers.append(
                subprocess.Popen(
                    command, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
                )
            )
        for command, address, check, server in zip(commands, addresses, checks, servers, strict=True):
            wait(f"{address}{check}", " ".join(command[2:4]), server)
        yield Places(*addresses)
    finally:
        for server in servers:
            stop(server)


def stop(server: subprocess.Popen[bytes]) -> None:
    """The server and all that it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, how)
        except ProcessLookupError:
            break
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def wait(address: str, name: str, server: subprocess.Popen[bytes]) -> None:
    """Until it answers. Raises ValueError where it does not."""
    end = time.monotonic() + READY_SECONDS
    while server.poll() is None and time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=10):
                return
        except (urllib.error.URLError, http.client.HTTPException, OSError):
            time.sleep(0.5)
    raise ValueError(f"{name} was not ready after {READY_SECONDS} s; start it by hand to see what it says")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
