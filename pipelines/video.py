"""Two minutes of the real thing: a terminal, the report, MLflow, Prefect and the page of the service, filmed as they are used.

It wants a finished `make repro`, and a `make flow`, of which Prefect's page has something to show. What it does to the project is what it
shows: one rung is trained again, is killed, goes on, and ends in the bytes that it had. Captions say what is seen, and where it is played
faster.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.bento import package, serving
from pipelines.filming import COLUMNS, HEIGHT, WIDTH, Camera, Terminal
from pipelines.servers import free_port, running

LARGEST_BYTES = 5_000_000
QUESTIONS = ("What is Polo?", "What is Belize?")
KILLED_RUNG = "mlp"
KILLED_AFTER = 12  # seconds: the imports, and some hundred steps


FLOW_RUN = "a[href*='flow-run']"
TABS = (
    ("Completion", "Continue", ".token", "What were each token's chances?"),
    ("Attention", "Draw", "rect", "What does each head look at? Nobody sees the future."),
    ("Evolution", "Write", ".card p", "One prompt through every rung, from counting to chat."),
)
"""Of the page of the service: a tab, its button, what then appears, and the caption."""


@dataclass(frozen=True)
class Places:
    """Where what is shown can be reached."""

    site: str
    mlflow: str
    prefect: str
    service: str


@contextmanager
def served(root: Path) -> Iterator[Places]:
    """Site, MLflow, Prefect and service, each on a free port of the loopback, until the block ends.

    Raises ValueError where one of them does not come up, and the package's own errors.
    """
    settings = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_API_URL": "/api",  # its page asks port 4200 otherwise, whichever the server has
        "NO_MKDOCS_2_WARNING": "1",
    }
    os.environ.update(settings)
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root}/var/mlflow.db"
    os.environ.setdefault("PREFECT_HOME", f"{root}/var/prefect")
    subprocess.run([sys.executable, "-m", "mkdocs", "build", "--quiet"], cwd=root, check=True)
    with (
        answering("/index.html", "http.server", "--bind", "127.0.0.1", "--directory", f"{root}/var/site") as site,
        answering("/health", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1", "--port") as mlflow,
        answering("/api/health", "prefect", "server", "start", "--host", "127.0.0.1", "--port") as prefect,
        serving(package(root, "")) as service,
    ):
        yield Places(site, mlflow, prefect, service)


@contextmanager
def answering(health: str, *module: str) -> Iterator[str]:
    """The address at which `python -m MODULE PORT` answers, until the block ends."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    with running([sys.executable, "-m", *module, str(port)], address + health, patience=10):
        yield address


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
            for scene, place in ((reading, places.site), (comparing, places.mlflow), (watching, places.prefect), (using, places.service)):
                scene(camera, place)
            camera.stop()
        except Error as error:
            said = " ".join(str(error).split())
            raise ValueError(f"the scene at {page.url} is not as expected: {said}; look at it in a browser") from None
        out.parent.mkdir(parents=True, exist_ok=True)
        camera.develop(out)
    if out.stat().st_size > LARGEST_BYTES:
        raise ValueError(f"{out}: {out.stat().st_size:,} bytes, wanted at most {LARGEST_BYTES:,}; show less, or raise crf in filming.py")
    return out


def in_the_terminal(camera: Camera, root: Path) -> None:
    """A rebuild with nothing to do, where a model comes from, and a training that is killed and goes on."""
    model = json.loads((root / "reports" / "verdict.json").read_text(encoding="utf-8"))["served"]
    by_hand = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    terminal = Terminal(camera.page, root, by_hand)
    try:
        rebuilding(camera, terminal)
        asking_whence(camera, terminal, model)
        killing(camera, terminal)
    finally:
        terminal.close()


def rebuilding(camera: Camera, terminal: Terminal) -> None:
    """Nothing to do, and what the graph is."""
    terminal.clear()
    camera.say("LLM from scratch: raw text becomes a model that answers over HTTP, by two commands.", 3)
    said = "The first is make repro. All is built already, so there is nothing to do."
    camera.say(f"{said}  (8× faster)")
    with camera.faster(8):
        terminal.run("make repro", 180)
    camera.say(said, 2)
    terminal.clear()
    camera.say("DVC knows what stands on what: this is what the search index is made of.  (3× faster)")
    with camera.faster(3):
        terminal.run("dvc dag index", 60)
    camera.page.wait_for_timeout(2000)


def asking_whence(camera: Camera, terminal: Terminal, model: str) -> None:
    """Where the served model comes from."""
    terminal.clear()
    said = "Where does the served model come from? Down to the archives, their sha256 and their licences."
    camera.say(f"{said}  (3× faster)")
    with camera.faster(3):
        terminal.run(f"python -m stages whence {model} | grep -E ' · |^ +(digest|origin|licence|sha256) ' | cut -c1-{COLUMNS - 2}", 120)
    camera.say(said, 6)


def killing(camera: Camera, terminal: Terminal) -> None:
    """A training that is killed goes on, and ends in the same bytes. What only a clock could change, DVC puts back."""
    weights = f"sha256sum artifacts/models/{KILLED_RUNG}/model.safetensors"
    training = f"python -m stages train {KILLED_RUNG}"
    terminal.clear()
    camera.say("Kill it anywhere: the same command goes on, and ends in the same bytes.  (2× faster)", 1)
    terminal.run(weights, 20)
    with camera.faster(2):
        terminal.run(f"timeout -s KILL {KILLED_AFTER} {training}", 60)
        camera.say("Killed, by SIGKILL. The same command again:  (2× faster)", 2)
        terminal.run(training, 120)
    terminal.run(weights, 20)
    camera.say("It went on from its last save, and the weights are the same, bit for bit.", 3.5)
    with camera.off():
        terminal.run(f"dvc checkout --force train@{KILLED_RUNG}", 60)


def reading(camera: Camera, site: str) -> None:
    """The report, and a post."""
    go(camera, f"{site}/reports/report.html", "h1")
    camera.say("The report is written by the run, and no number in it was typed.", 2)
    scroll(camera, 5)
    go(camera, f"{site}/docs/posts/nobody_pays_for_distance.html", "h1")
    camera.say("So are twelve weeks, the models' cards, and posts like this one.", 2)
    scroll(camera, 4)


def comparing(camera: Camera, mlflow: str) -> None:
    """The rungs side by side."""
    go(camera, compared(mlflow), "text=Parameters")
    camera.say("MLflow remembers every run: here the rungs side by side, on one ruler.", 3)
    scroll(camera, 4)


def watching(camera: Camera, prefect: str) -> None:
    """The newest run of the flow."""
    go(camera, f"{prefect}/runs", FLOW_RUN)
    camera.say("Prefect says when and where: a rebuild is a flow, with one task a node of the graph.", 3)
    with camera.off():
        camera.page.locator(FLOW_RUN).first.click()
        camera.page.wait_for_timeout(5000)
    camera.say("Prefect says when and where: a rebuild is a flow, with one task a node of the graph.", 4)


def using(camera: Camera, service: str) -> None:
    """The page of the service: a question, and what is behind an answer."""
    page = camera.page
    go(camera, f"{service}/ui/", "role=tab[name='Chat']")
    camera.say("make serve: the chat answers from passages, and shows them.", 1.5)
    chat(camera)
    page.wait_for_timeout(4000)
    for name, button, shown, caption in TABS:
        page.get_by_role("tab", name=name, exact=True).click()
        camera.say(caption, 0.7)
        panel = page.get_by_role("tabpanel").filter(visible=True)
        panel.get_by_role("button", name=button).click()
        panel.locator(shown).first.wait_for()
        page.wait_for_timeout(4500)
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
        camera.page.locator(wanted).first.wait_for(timeout=30_000)
        camera.page.wait_for_timeout(1500)
        camera.page.mouse.move(WIDTH / 2, HEIGHT / 2)


def scroll(camera: Camera, seconds: float) -> None:
    for _ in range(round(seconds * 5)):
        camera.page.mouse.wheel(0, 90)
        camera.page.wait_for_timeout(200)


def warm_up(page: Any, places: Places) -> None:
    """Pages that are slow the first time they are asked for. Raises ValueError where one of them would be empty."""
    if not asked(f"{places.prefect}/api/flow_runs/count", {}):
        raise ValueError("Prefect has no run of a flow; make flow makes one")
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
