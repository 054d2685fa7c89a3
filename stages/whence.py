"""Where something comes from: `python -m stages whence THING`, down to the sources, their licences and their sha256.

THING is a bundle (its name or folder), a figure or page of reports/, a digest or its beginning, or what a served answer bears: its
`system_fingerprint`, or one of the headers X-Bundle-Digest, X-Index-Digest and X-Embedder-Digest.

Not a node of the graph, and it writes nothing. Bundles are linked by the digests in their manifests. dvc.lock says with which params a
bundle was made, where it is still the one that dvc.lock knows, and git which commit that was; MLflow, where there is a store, which run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from llm_from_scratch import bundle, tracking
from llm_from_scratch.bundle import Manifest
from llm_from_scratch.registry.remembered import remembered

PLACES = ("artifacts/*", "artifacts/*/*", "var/index", "var/bentoml/models/*/*/*", "var/bentoml/models/*/*/rungs/*")
"""Where bundles lie; the packaged ones come last, being copies."""
SHOWN = ("origin", "licence", "sha256", "source", "source_sha256", "architecture", "scheme", "method", "parameters", "passages")
"""Facts of a manifest that are worth a line; --json has all of them, and the params of other sections that the stage reads."""
QUIET = ("facts", "params_beside")
PAGES = ("README.md", "SUMMARY.md")
POSTS = Path("docs/posts")
"""With PAGES, what is filled from the report's numbers outside of reports/."""
METRICS = "reports/metrics.json"
TEMPLATES = files("llm_from_scratch.report") / "templates"
FIGURES = {
    "ladder": "ladder",
    "loss_curves": "ladder",
    "quantization": "quantize",
    "question_answering": "rag",
    "alignment": "alignment",
    "frontier": "alignment",
    "calibration": "alignment",
    "encodings": "tokenize",
    "token_lengths": "tokenize",
    "heatmap_attention": "ladder.attention",
    "heatmap_gpt": "ladder.gpt",
}
"""What `evaluate` draws, and the keys of metrics.json whose bundles it draws it from."""
BESIDE = {"drills": "python -m drills", "certificate": "python -m pipelines certify", "digests": "python -m stages digests"}
"""Files of reports/ that no node of the graph makes, and the commands that do."""
HOMES = dict.fromkeys(("ladder", "mixture", "quantize", "finetune", "alignment"), "models") | {"tokenize": "tokens", "data": "raw"}
"""Keys of metrics.json that have an entry for each bundle, and where those lie in artifacts/."""
SECTIONS = {"download": "sources"}
"""Stages whose section of params.yaml is not called as they are."""
WIDTH = 140


@dataclass(frozen=True)
class Link:
    """One thing of a chain: where it lies, what it is, what is known of it, and what it was made from, by role."""

    what: str
    kind: str
    facts: dict[str, Any]
    parents: dict[str, Link]


@dataclass(frozen=True)
class Project:
    """What is here: bundles by folder, the params, the nodes of dvc.lock, and the numbers of the report."""

    root: Path
    bundles: Mapping[str, Manifest]
    params: Mapping[str, Any]
    lock: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def knowing(self, folder: str) -> Project:
        """The same with the bundle in `folder`, wherever that is. Raises BundleError where its manifest cannot be read."""
        return replace(self, bundles={**self.bundles, folder: bundle.read_manifest(self.root / folder)})


def main(given: Sequence[str]) -> None:
    """The command, in the project's folder. Raises ValueError where there is no such thing, or where a bundle on the way is damaged."""
    parser = argparse.ArgumentParser(prog="python -m stages whence", description="Say where something comes from.")
    parser.add_argument("thing", help="a bundle, a figure or page of reports/, a digest or its beginning, or the fp_… of an answer")
    parser.add_argument("--json", action="store_true", help="for programs")
    asked = parser.parse_args(given)
    chain = find(opened(Path.cwd()), asked.thing)
    print(json.dumps(asdict(chain), indent=2, ensure_ascii=False) if asked.json else "\n".join(told(chain)))
    if damaged := next(damages(chain), None):
        raise ValueError(damaged)


def opened(root: Path) -> Project:
    """The project in the folder `root`. What has a manifest that cannot be read is named on stderr, and is not here."""
    bundles = {}
    for folder in (folder for place in PLACES for folder in sorted(root.glob(place)) if (folder / bundle.MANIFEST).exists()):
        try:
            bundles[folder.relative_to(root).as_posix()] = bundle.read_manifest(folder)
        except bundle.BundleError as error:
            print(error, file=sys.stderr)
    metrics = root / METRICS
    numbers = json.loads(metrics.read_text(encoding="utf-8")) if metrics.exists() else {}
    return Project(root, bundles, mapping(root / "params.yaml"), mapping(root / "dvc.lock").get("stages", {}), numbers)


def find(project: Project, thing: str) -> Link:
    """The chain that ends in `thing`. Raises ValueError where it means nothing here, or more than one thing."""
    chains = Chains(project)
    path = Path(os.path.abspath(project.root / thing))
    inside = path.relative_to(project.root) if path.is_relative_to(project.root) else path
    for folder in (inside, *inside.parents) if path.exists() else ():
        if (project.root / folder / bundle.MANIFEST).exists():
            return Chains(project.knowing(folder.as_posix())).bundle(folder.as_posix())
    if path.is_file() and (inside.parts[0] == "reports" or filled(inside)):
        return chains.report(inside)
    if named := [folder for folder in project.bundles if Path(folder).name == thing and folder.startswith("artifacts")]:
        return chains.bundle(only(thing, named))
    if re.fullmatch(r"(fp_)?[0-9a-f]{6,64}", thing):
        return chains.bundle(with_digest(project, thing.removeprefix("fp_")))
    names = ", ".join(sorted({Path(folder).name for folder in project.bundles if folder.startswith("artifacts")})) or "none; dvc repro"
    raise ValueError(
        f"nothing here is called {thing[:80]!r}; wanted a bundle ({names}), a file of reports/, six or more digits of a digest, "
        "or an answer's system_fingerprint or X-Bundle-Digest"
    )


def with_digest(project: Project, beginning: str) -> str:
    """The folder of the one bundle with that digest, or with a file or a source of that sha256. Raises ValueError as `find` does."""
    if found := [folder for folder, made in project.bundles.items() if made.digest.startswith(beginning)]:
        if len({project.bundles[folder].digest for folder in found}) == 1:
            return found[0]
        return only(beginning, found)
    if found := [folder for folder, made in project.bundles.items() if any(sha.startswith(beginning) for sha in held(made))]:
        return only(beginning, [folder for folder in found if folder.startswith("artifacts")] or found)
    for name, digest in project.metrics.get("digests", {}).items():
        if digest.startswith(beginning):
            raise ValueError(
                f"{beginning} is {name} of {METRICS}, but the one here is another; dvc repro makes it, dvc checkout brings it back"
            )
    raise ValueError(
        f"no bundle here has the digest {beginning}…; dvc checkout brings back those of dvc.lock, git log -S{beginning} older ones"
    )


def held(made: Manifest) -> list[str]:
    """The sha256 of what a bundle holds or was read from."""
    sources = made.facts.get("sha256", [])
    return [*made.files.values(), *([sources] if isinstance(sources, str) else sources)]


def only(thing: str, folders: Sequence[str]) -> str:
    if len(folders) > 1:
        raise ValueError(f"{thing} is in {len(folders)} bundles, {', '.join(folders)}; name one by its folder")
    return folders[0]


class Chains:
    """Chains of one project; what many of them share is looked at once."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.bundle = cache(self._bundle)
        self.content = cache(content)
        tracking.connect(store(project.root), rebuild="", revision="", digests={})

    def _bundle(self, folder: str) -> Link:
        """The bundle in `folder` and all that it was made from."""
        project, made = self.project, self.project.bundles[folder]
        facts: dict[str, Any] = {"digest": made.digest, "made_by": made.made_by, **intact(project.root / folder)}
        facts |= {name: made.facts[name] for name in SHOWN if name in made.facts}
        if tokenizer := made.facts.get("tokenizer_digest", made.files.get("tokenizer.json")):
            facts["tokenizer"] = tokenizer
        facts |= built(project, made.made_by, self.content(project.root / folder))
        parents = {role: self.parent(made, digest) for role, digest in made.parents.items()}
        here = {parent.what: self.content(project.root / parent.what) for parent in parents.values() if parent.what in project.bundles}
        facts |= remembered(made.made_by, made.digest, here, facts.get("params", {}))
        return Link(folder, made.kind, facts | {"facts": made.facts}, parents)

    def parent(self, child: Manifest, digest: str) -> Link:
        """The bundle with that digest, or that it is not here."""
        for folder, made in self.project.bundles.items():
            if made.digest == digest:
                return self.bundle(folder)
        return missing(digest, f"another may have taken its place; dvc repro {child.made_by} makes this anew, from what is here")

    def report(self, path: Path) -> Link:
        """A figure or page of the report, with the bundles that its numbers are of, as metrics.json has them."""
        if path.parent.name == "benchmarks" or path.stem in BESIDE:
            return by_hand(self.project.root, path)
        keys = keys_of(self.project, path)
        facts: dict[str, Any] = {"made_by": "readme, from evaluate" if filled(path) else "evaluate", "numbers": METRICS, "keys": keys}
        facts |= committed(self.project.root, path)
        facts |= {"params": self.project.params.get("evaluate", {}), "params_from": "params.yaml as it is now"}
        facts |= remembered("evaluate", "", {}, facts["params"])
        places = dict.fromkeys(place for key in keys for place in self.places(key))
        return Link(
            path.as_posix(), "figure" if path.suffix == ".png" else "page", facts, {place: self.reported(place) for place in places}
        )

    def places(self, key: str) -> Iterator[str]:
        """The folders of the bundles that the numbers under a key of metrics.json are of."""
        section, _, entry = key.partition(".")
        served = f"artifacts/models/{self.project.metrics.get('served', {}).get('model', '')}"
        if section in HOMES:
            for name in [entry] if entry else self.project.metrics.get(section, {}):
                yield f"artifacts/{HOMES[section]}/{name}"
        elif section == "digests":
            yield from (f"artifacts/models/{name}" for name in self.project.metrics.get("digests", {}))
        else:
            yield from {"rag": (served, "artifacts/index"), "served": (served,)}.get(section, ("artifacts/index",))

    def reported(self, place: str) -> Link:
        """The bundle at `place` as the report knew it: by its digest there, else by DVC's, else the one that is here now."""
        digests = self.project.metrics.get("digests", {})
        name = Path(place).name
        if place == f"artifacts/models/{name}" and name in digests:
            for folder, made in self.project.bundles.items():
                if made.digest == digests[name]:
                    return self.bundle(folder)
            return missing(digests[name], f"{METRICS} is of it, and {place} is another or none; dvc checkout or dvc repro makes them agree")
        if place not in self.project.bundles:
            return missing(place, "dvc checkout or dvc repro brings it")
        read = {dep["path"]: dep["md5"] for dep in self.project.lock.get("evaluate", {}).get("deps", [])}
        if read.get(place, now := self.content(self.project.root / place)) != now:
            return missing(place, f"evaluate read {read[place]}, and {now} is here; dvc checkout or dvc repro makes them agree")
        return self.bundle(place)


def missing(what: str, hint: str) -> Link:
    return Link(what, "not here", {"next": hint}, {})


def by_hand(root: Path, path: Path) -> Link:
    """A table of benchmarks/, or what is BESIDE the graph: no node makes it, and it says itself on which machine it was made."""
    table = root / path.with_suffix(".json")
    said = json.loads(table.read_text(encoding="utf-8")) if table.exists() else {}
    facts = {"made_by": BESIDE.get(path.stem, f"python -m benchmarks.{path.stem}"), **committed(root, path)}
    return Link(path.as_posix(), "table", facts | {name: said[name] for name in ("machine", "settings", "made_on") if name in said}, {})


def filled(path: Path) -> bool:
    return str(path) in PAGES or path.parent == POSTS


def keys_of(project: Project, path: Path) -> list[str]:
    """The keys of metrics.json, a section or one of its entries, that a page or figure is made of; from the page's own template."""
    if path.suffix == ".png":
        if path.stem not in FIGURES:
            raise ValueError(f"{path}: no figure that evaluate draws; there is {', '.join(FIGURES)}")
        return [FIGURES[path.stem]]
    if path.parent.name == "cards" and path.stem != "retriever":
        return [f"{section}.{path.stem}" for section in HOMES if path.stem in project.metrics.get(section, {})]
    if path.suffix == ".json":
        return list(project.metrics)
    folder = f"{path.parent.name}/" if path.parent.name in ("weeks", POSTS.name) else ""
    names = [f"{folder}{path.stem.lower()}.md.j2"]
    if path.name == "README.md":
        names = sorted(template.name for template in TEMPLATES.iterdir() if template.name.startswith("readme_"))
    if unknown := [name for name in names if not (TEMPLATES / name).is_file()]:
        raise ValueError(f"{path}: no page that the run writes, for there is no template {unknown[0]}")
    macros = dict(
        re.findall(r"{% macro (\w+)\(.*?%}(.*?){%-? endmacro", (TEMPLATES / "_tables.md.j2").read_text(encoding="utf-8"), re.DOTALL)
    )
    text = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)
    text += "\n".join(macros[name] for name in re.findall(r"tables\.(\w+)\(", text))
    used = [(section, entry) for section, entry in re.findall(r"\bm\.(\w+)\.?(\w*)", text) if section in project.metrics]
    whole = {section for section, entry in used if section not in HOMES or entry not in project.metrics[section]}
    return list(dict.fromkeys(section if section in whole else f"{section}.{entry}" for section, entry in used))


def intact(folder: Path) -> dict[str, Any]:
    try:
        return {"files": f"{len(bundle.verify(folder).files)}, all as sealed"}
    except bundle.BundleError as error:
        return {"damaged": str(error)}


def built(project: Project, made_by: str, found: str) -> dict[str, Any]:
    """The params that a bundle was made with and the commit that recorded it, if dvc.lock has what was `found`; else today's params."""
    stage, _, name = made_by.partition("@")
    section = project.params.get(SECTIONS.get(stage, stage), {})
    now = section.get(name, {}) if name else section
    node = project.lock.get(made_by, {})
    outs = [out["md5"] for out in node.get("outs", []) if not out["path"].startswith("artifacts/logs")]
    if found not in outs:
        known = {"dvc": f"{found}, of which dvc.lock knows nothing; it has {' '.join(outs) or 'none'} of {made_by}"}
        return known | ({"params": now, "params_from": "params.yaml as it is now"} if now else {})
    recorded = dict(node.get("params", {}).get("params.yaml", {}))
    then = recorded.pop(".".join(filter(None, (SECTIONS.get(stage, stage), name))), {})
    since = "" if then == now else ", and params.yaml has others now"
    with_it = git(project.root, "log", "--format=%H", f"-S{found}", "--", "dvc.lock").splitlines()
    commit = with_it[-1] if with_it else "none has it in its dvc.lock yet"
    return {"params": then, "params_beside": recorded, "params_from": f"dvc.lock{since}", "dvc": found, "commit": commit}


def committed(root: Path, path: Path) -> dict[str, str]:
    """The commit that last wrote a file, and whether it was changed since."""
    commit = git(root, "log", "-1", "--format=%H", "--", str(path)) or "none"
    changed = git(root, "status", "--porcelain", "--", str(path))
    return {"commit": f"{commit}, and changed since" if changed else commit}


def git(root: Path, *arguments: str) -> str:
    """What git says; nothing outside a repository or without git."""
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def content(folder: Path) -> str:
    """DVC's digest of a folder, as dvc.lock and MLflow's datasets have it: md5 of the sorted list of its files' md5."""
    found = (path for path in folder.rglob("*") if path.is_file())
    listed = [{"md5": md5(path), "relpath": path.relative_to(folder).as_posix()} for path in found]
    listed.sort(key=lambda row: row["relpath"])
    return hashlib.md5(json.dumps(listed).encode(), usedforsecurity=False).hexdigest() + ".dir"


def md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def store(root: Path) -> str:
    """The address of MLflow's store: what MLFLOW_TRACKING_URI says, else where make puts it; "" where none is."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'var/mlflow.db'}")
    return "" if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists() else uri


def flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """One row a number, named by its path."""
    rows: dict[str, str] = {}
    for name, value in params.items():
        rows |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return rows


def told(link: Link, role: str = "", depth: int = 0, seen: set[str] | None = None) -> Iterator[str]:
    """The chain as an indented tree; what was told once is only named again."""
    seen = set() if seen is None else seen
    pad = "  " * depth
    head = f"{pad}{role + ' ← ' if role and role != link.what else ''}{link.what} · {link.kind}"
    yield f"{head}, told above" if link.what in seen else head
    if link.what in seen:
        return
    seen.add(link.what)
    for name, value in link.facts.items():
        if name not in QUIET:
            yield from wrapped(f"{pad}  {name.replace('_', ' '):<14}", value)
    for part, parent in link.parents.items():
        yield from told(parent, part, depth + 1, seen)


def wrapped(label: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        value = ", ".join(f"{name}: {text}" for name, text in flat(value).items())
    elif isinstance(value, list):
        value = ", ".join(map(str, value))
    return textwrap.wrap(f"{label}{value}", WIDTH, subsequent_indent=" " * len(label), break_long_words=False, drop_whitespace=True)


def damages(link: Link) -> Iterator[str]:
    if "damaged" in link.facts:
        yield link.facts["damaged"]
    for parent in link.parents.values():
        yield from damages(parent)


def mapping(path: Path) -> dict[str, Any]:
    """A YAML file as DVC reads it; empty where there is none."""
    from ruamel.yaml import YAML, YAMLError

    try:
        tree = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except YAMLError as error:
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
    return tree if isinstance(tree, dict) else {}
