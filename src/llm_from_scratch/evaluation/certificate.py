"""Is a rebuild the same as another? Bit by bit on the same kind of machine, else in what held-out text costs.

Digests of bundles cover their ancestors too: one bit that differs in a base model differs in all that was made from it. Another CPU adds up
in another order, which training carries into every weight; what it must not change is how well the model predicts.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from llm_from_scratch.section import Section


class CertifyParams(Section):
    """`maximum_bpb_difference`: by how many bits per byte a model rebuilt on another kind of machine may differ."""

    maximum_bpb_difference: float = Field(gt=0)


class Rebuild(Section):
    """What a rebuild left: on what it was made (CPU, threads, library versions), the digest of each bundle by its folder in artifacts/,
    and the bits per byte of each model that was scored."""

    made_on: dict[str, str]
    digests: dict[str, str]
    val_bpb: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Two rebuilds, held against each other. `moved` is by how many bits per byte each model differs, the most first."""

    equal: list[str]
    different: list[str]
    missing: list[str]
    elsewhere: dict[str, tuple[str, str]]
    moved: dict[str, float]
    tolerance: float

    @property
    def same_machine(self) -> bool:
        return not self.elsewhere

    @property
    def holds(self) -> bool:
        """Every digest is equal, or, on another kind of machine, every model's bits per byte are within the tolerance."""
        if self.missing:
            return False
        return not self.different or (not self.same_machine and max(self.moved.values(), default=0.0) <= self.tolerance)

    def line(self) -> str:
        """For a person: how many digests are equal, and where some are not, why that may be and by how much it matters."""
        wanted = len(self.equal) + len(self.different) + len(self.missing)
        said = [f"{len(self.equal)} of {wanted} digests equal the committed ones ({self._machines()})"]
        if self.missing:
            said.append(f"{len(self.missing)} not here, such as {self.missing[0]}")
        if self.different:
            said.append(f"the first that differs is {self.different[0]}")
            name, most = next(iter(self.moved.items()), ("", 0.0))
            fits = "within" if most <= self.tolerance else "beyond"
            said.append(f"bits per byte differ by at most {most:.5f}{f' ({name})' if most else ''}, {fits} {self.tolerance}")
        return "; ".join(said)

    def _machines(self) -> str:
        if self.same_machine:
            return "same CPU family"
        return ", ".join(f"{what} {here} here, {there} there" for what, (here, there) in self.elsewhere.items())


def compare(mine: Rebuild, theirs: Rebuild, tolerance: float) -> Comparison:
    """This rebuild against the committed one; what only this one has is not compared."""
    moved = {name: abs(mine.val_bpb[name] - bits) for name, bits in theirs.val_bpb.items() if name in mine.val_bpb}
    facts = {**theirs.made_on, **mine.made_on}
    return Comparison(
        equal=[name for name, digest in theirs.digests.items() if mine.digests.get(name) == digest],
        different=[name for name, digest in theirs.digests.items() if mine.digests.get(name, digest) != digest],
        missing=[name for name in theirs.digests if name not in mine.digests],
        elsewhere={
            what: (mine.made_on.get(what, "none"), theirs.made_on.get(what, "none"))
            for what in facts
            if mine.made_on.get(what) != theirs.made_on.get(what)
        },
        moved=dict(sorted(moved.items(), key=lambda row: -row[1])),
        tolerance=tolerance,
    )
