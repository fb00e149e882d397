"""Modules that are imported when they are first used.

A command declares its options and checks its spec before torch and Ray are imported, which takes seconds.
"""

import importlib
from typing import Any


class Later:
    """A module by name, which is imported when an attribute of it is first needed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
