"""Models of visual cortex: `import cortexlit as cx`, then `cx.<TAB>`."""

__version__ = "0.1.0"

from .front import PLACES, find


def __getattr__(name: str) -> object:
    return find(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
