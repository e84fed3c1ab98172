"""The form CITY as a model of pydantic, for clients that are asked by one."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class City(BaseModel, extra="forbid"):
    """The weather of a city. (A small model that may add properties of its own adds them until it is cut.)"""

    city: Literal["Paris", "Rome"]
    warm: bool
