"""The base of every params model: one section of params.yaml, frozen, strict and without defaults.

It lies below all packages, so that each can declare its own section beside the code that reads it.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, strict (no silent conversion), and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", protected_namespaces=())
