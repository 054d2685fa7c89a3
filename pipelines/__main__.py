"""What happens around `dvc repro`: `python -m pipelines rebuild`, `… deploy`, `… experiment smoke`, `… promote`, `… package`, `… serve`,
`… serve-smoke`, `… screenshots`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return int(arguments.do(arguments) or 0)
    except (ValueError, OSError) as error:
        print(f"pipelines {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="Run, schedule, promote and serve what the graph builds.")
    commands = parser.add_subparsers(dest="command", required=True)

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

    experiment = commands.add_parser("experiment", help="the graph under a profile, as a DVC experiment; params.yaml stays as it is")
    experiment.add_argument("profile", help="an overlay in profiles/, such as smoke or gpu")
    experiment.add_argument("dvc", nargs="*", help="more for `dvc exp run`, after --, such as -S train.base.steps=100")
    experiment.set_defaults(do=_experiment)

    promote = commands.add_parser("promote", help="register the finished models in MLflow and move the champion alias by its rule")
    promote.set_defaults(do=_promote)

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

    smoke = commands.add_parser("serve-smoke", help="package, serve on a free port, ask, check whose answer it is, and stop")
    smoke.set_defaults(do=_serve_smoke)

    screenshots = commands.add_parser("screenshots", help="pictures of the page's tabs, from a Bento packaged and served for it")
    screenshots.add_argument("--out", type=Path, default=Path("docs/screenshots"), help="their folder (default: docs/screenshots)")
    screenshots.add_argument("--url", default="", help="a server that runs already, such as http://127.0.0.1:3000 (default: serve one)")
    screenshots.set_defaults(do=_screenshots)
    return parser


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


def _promote(_: argparse.Namespace) -> None:
    from pipelines.promote import promote

    for line in promote(Path.cwd()):
        print(line)


def _package(arguments: argparse.Namespace) -> None:
    from pipelines.bento import package

    print(package(Path.cwd(), arguments.api_key_file))


def _serve(arguments: argparse.Namespace) -> int:
    from pipelines.bento import serve

    return serve(Path.cwd(), arguments.host, arguments.port, arguments.api_key_file)


def _serve_smoke(_: argparse.Namespace) -> None:
    from pipelines.smoke import serve_smoke

    print(serve_smoke(Path.cwd()))


def _screenshots(arguments: argparse.Namespace) -> None:
    from pipelines.screenshots import screenshots

    for path in screenshots(Path.cwd(), arguments.out, arguments.url):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
