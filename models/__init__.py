"""What can be run: architectures described as graphs. Executes nothing."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qrun.models.architectures import ARCHITECTURES, DRAFTS, SPARSE, build_drafts, build_graph, check_goes_on
    from qrun.models.graph import Graph

__all__ = ["ARCHITECTURES", "DRAFTS", "SPARSE", "Graph", "build_drafts", "build_graph", "check_goes_on"]


def __getattr__(name: str) -> Any:
    """Imported when first asked for: who needs one file of this folder does not wait for all of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"qrun.models.{'graph' if name == 'Graph' else 'architectures'}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
