"""What happens around `dvc repro`, each a command: `python -m pipelines --help` lists them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from stages.__main__ import quick_log

Commands = argparse._SubParsersAction  # of an ArgumentParser; argparse has no public name for it
REGISTRY = {"rollback", "restore"}  # and whatever is told --champion


def main() -> int:
    arguments = _parser().parse_args()
    quick_log()
    _settle(arguments)
    try:
        return int(arguments.do(arguments) or 0)
    except (ValueError, OSError) as error:
        print(f"pipelines {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _settle(arguments: argparse.Namespace) -> None:
    """BentoML's store and, for what reads the registry, MLflow's are where make has them, unless the environment says otherwise."""
    os.environ.setdefault("BENTOML_HOME", str(Path.cwd() / "var/bentoml"))
    if arguments.command in REGISTRY or getattr(arguments, "champion", False):
        from stages.whence import store

        os.environ.setdefault("MLFLOW_TRACKING_URI", store(Path.cwd()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="Run, schedule, promote and serve what the graph builds.")
    commands = parser.add_subparsers(dest="command", required=True)
    for subject in (_building, _trying, _registering, _serving, _showing, _checking):
        subject(commands)
    return parser


def _building(commands: Commands) -> None:
    """The graph, here or by a Prefect server."""
    rebuild = commands.add_parser("rebuild", help="the graph as a Prefect flow, one task a node")
    rebuild.add_argument("--trainer", default="", help="the deployment that trains, such as train/gpu (default: train here)")
    rebuild.add_argument(
        "--beside", type=int, default=0, help="other nodes at a time next to one that trains (default: 0, one node at a time)"
    )
    rebuild.set_defaults(do=_rebuild)

    deploy = commands.add_parser("deploy", help="pools, GPU limit, automation and deployments, on the Prefect server; repeat it freely")
    deploy.add_argument("--suffix", default="", help="added to each deployment's name, for a second clone on one server (default: none)")
    deploy.add_argument("--notify", default="", help="a Prefect block, TYPE/NAME, that hears of failures (default: nobody does)")
    deploy.add_argument("--kubernetes", action="store_true", help="the GPU pool is of Kubernetes jobs, by pipelines/kubernetes.json")
    deploy.set_defaults(do=_deploy)


def _trying(commands: Commands) -> None:
    """The graph with other params."""
    experiment = commands.add_parser("experiment", help="the graph under a profile, as a DVC experiment; params.yaml stays as it is")
    experiment.add_argument("profile", help="an overlay in profiles/, such as smoke or gpu")
    experiment.add_argument("dvc", nargs="*", help="more for `dvc exp run`, after --, such as -S train.base.steps=100")
    experiment.set_defaults(do=_experiment)

    sweep = commands.add_parser("sweep", help="every combination in a grid, as DVC experiments and as runs of MLflow under one")
    sweep.add_argument("grid", nargs="?", default="base", help="a file in profiles/grids/, with lists of what is tried (default: base)")
    sweep.add_argument("targets", nargs="*", default=["train@base"], help="nodes of the graph, evaluate for all (default: train@base)")
    sweep.add_argument("--profile", default="", help="an overlay that all of them have, such as smoke (default: none)")
    sweep.add_argument("--jobs", type=int, default=1, help="experiments at a time (default: 1)")
    sweep.add_argument("--name", default="", help="of the sweep (default: the grid's, and the time)")
    sweep.set_defaults(do=_sweep)


def _registering(commands: Commands) -> None:
    """The models in the registry."""
    promote = commands.add_parser("promote", help="register the finished models in MLflow and move the champion alias by its rule")
    promote.set_defaults(do=_promote)

    rollback = commands.add_parser("rollback", help="make the champion before champion again, and bring its files back")
    rollback.add_argument("name", help="a registered model, such as served, sft or retriever")
    rollback.add_argument("--to", default="", metavar="VERSION", help="the version to take (default: what the champion took over from)")
    rollback.set_defaults(do=_rollback)

    restore = commands.add_parser("restore", help="bring the bundle of a registered version back from DVC's cache")
    restore.add_argument("digest", help="of the bundle, or its beginning")
    restore.set_defaults(do=_restore)


def _serving(commands: Commands) -> None:
    """The service."""
    package = commands.add_parser("package", help="build the Bento from the finished model, index and embedder")
    package.set_defaults(do=_package)

    serve = commands.add_parser("serve", help="package, then answer over HTTP")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: loopback only)")
    serve.add_argument("--port", type=int, default=3000, help="port to bind (default: 3000)")
    for closed in (package, serve):
        closed.add_argument(
            "--api-key-file", default="", help="where it is served, a file with the key that clients must bear (default: none)"
        )
    serve.set_defaults(do=_serve)

    reload = commands.add_parser("reload", help="store the chosen model and let a running server take it over, with nobody cut off")
    reload.add_argument("--url", default="http://127.0.0.1:3000", help="the server (default: http://127.0.0.1:3000)")
    reload.add_argument("--api-key-file", default="", help="the file with the server's key, if it has one (default: none)")
    reload.set_defaults(do=_reload)
    for command in (package, serve, reload):
        command.add_argument(
            "--champion", action="store_true", help="the registry's champions, whatever evaluate chose last (default: what it chose)"
        )
        command.add_argument(
            "--index", type=Path, help="answer from this one, such as var/index of `stages documents` (default: artifacts/index)"
        )

    smoke = commands.add_parser("serve-smoke", help="package, serve on a free port, ask, check whose answer it is, and stop")
    smoke.set_defaults(do=_serve_smoke)


def _showing(commands: Commands) -> None:
    """What a finished build looks like."""
    screenshots = commands.add_parser("screenshots", help="pictures of the page's tabs, from a Bento packaged and served for it")
    screenshots.add_argument("--out", type=Path, default=Path("docs/screenshots"), help="their folder (default: docs/screenshots)")
    screenshots.add_argument("--url", default="", help="a server that runs already, such as http://127.0.0.1:3000 (default: serve one)")
    screenshots.set_defaults(do=_screenshots)

    video = commands.add_parser("video", help="a walkthrough of a finished build, filmed from the real servers and a real shell")
    video.add_argument("--out", type=Path, default=Path("docs/walkthrough.webm"), help="the file (default: docs/walkthrough.webm)")
    video.set_defaults(do=_video)


def _checking(commands: Commands) -> None:
    """Whether what is built can be trusted."""
    certify = commands.add_parser("certify", help="the graph under a profile, built twice in two clones of HEAD, with equal digests")
    certify.add_argument("--profile", default="smoke", help="an overlay in profiles/ (default: smoke)")
    certify.set_defaults(do=_certify)

    fsck = commands.add_parser("fsck", help="read every object of DVC's cache, remove what is damaged, and say what is not in it")
    fsck.set_defaults(do=_fsck)


def _rebuild(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")  # a busy machine is slow to start the temporary one
    from pipelines.rebuild import rebuild

    try:
        rebuild(trainer=arguments.trainer, beside=arguments.beside)
    except RuntimeError as error:  # Prefect's word for a server that is not there
        raise ValueError(f"{error}; start it with make prefect, or unset PREFECT_API_URL to do without") from None


def _deploy(arguments: argparse.Namespace) -> None:
    from httpx import ConnectError
    from prefect.settings import PREFECT_API_URL

    from pipelines.deploy import deploy

    if not (server := PREFECT_API_URL.value()):
        raise ValueError("PREFECT_API_URL names no server; make prefect, then export PREFECT_API_URL=http://127.0.0.1:4200/api")

    try:
        for line in deploy(arguments.suffix, arguments.notify, arguments.kubernetes):
            print(line)
    except ConnectError as error:
        raise ValueError(f"no Prefect server at {server} ({error}); start it with make prefect") from None


def _experiment(arguments: argparse.Namespace) -> int:
    from pipelines.profiles import experiment

    return experiment(arguments.profile, arguments.dvc)


def _sweep(arguments: argparse.Namespace) -> int:
    from pipelines import dvc
    from pipelines.sweep import sweep, table

    name = arguments.name or f"{arguments.grid}-{time.strftime('%y%m%d-%H%M%S')}"
    status = sweep(Path.cwd(), arguments.grid, arguments.profile, arguments.targets, name, arguments.jobs)
    if not status:
        print(table(dvc.output("exp", "show", "--csv"), name))
    return status


def _promote(_: argparse.Namespace) -> None:
    from pipelines.promote import promote

    for line in promote(Path.cwd()):
        print(line)


def _rollback(arguments: argparse.Namespace) -> None:
    from pipelines.champion import rollback

    print(rollback(Path.cwd(), arguments.name, arguments.to))


def _restore(arguments: argparse.Namespace) -> None:
    from pipelines.champion import restored

    print(restored(Path.cwd(), arguments.digest))


def _package(arguments: argparse.Namespace) -> None:
    from pipelines.bento import package

    print(package(Path.cwd(), arguments.api_key_file, arguments.champion, arguments.index))


def _serve(arguments: argparse.Namespace) -> int:
    from pipelines.bento import serve

    return serve(Path.cwd(), arguments.host, arguments.port, arguments.api_key_file, arguments.champion, arguments.index)


def _reload(arguments: argparse.Namespace) -> None:
    from pipelines.bento import reload

    print(reload(Path.cwd(), arguments.url, arguments.api_key_file, arguments.champion, arguments.index))


def _serve_smoke(_: argparse.Namespace) -> None:
    from pipelines.smoke import serve_smoke

    print(serve_smoke(Path.cwd()))


def _screenshots(arguments: argparse.Namespace) -> None:
    from pipelines.screenshots import screenshots

    for path in screenshots(Path.cwd(), arguments.out, arguments.url):
        print(path)


def _certify(arguments: argparse.Namespace) -> int:
    from pipelines.certify import certify

    return 0 if certify(Path.cwd(), arguments.profile) else 1


def _fsck(_: argparse.Namespace) -> None:
    from pipelines.fsck import fsck

    for line in fsck():
        print(line)


def _video(arguments: argparse.Namespace) -> None:
    from pipelines.video import video

    print(video(Path.cwd(), arguments.out.resolve()))


if __name__ == "__main__":
    sys.exit(main())
