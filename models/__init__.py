"""What can be run: architectures described as graphs. Executes nothing."""

from typing import TYPE_CHECKING

from qrun.formats.on_demand import on_demand

if TYPE_CHECKING:
    from qrun.models.architectures import ARCHITECTURES, DRAFTS, build_drafts, build_graph, check_goes_on
    from qrun.models.graph import Graph

__all__ = ["ARCHITECTURES", "DRAFTS", "Graph", "build_drafts", "build_graph", "check_goes_on"]

# Imported when first asked for: who needs one file of this folder does not wait for all of them.
__getattr__, __dir__ = on_demand(__name__, {
    name: f"qrun.models.{'graph' if name == 'Graph' else 'architectures'}" for name in __all__
})  # fmt: skip
