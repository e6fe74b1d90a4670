"""Methods of spending test-time compute on a prompt; needs only NumPy and ONNX Runtime."""

from .methods import METHODS
from .policy import Choice, Policy, cross_validated, fit_policy, quantile_bins
from .result import Cost, Node, SearchResult
from .search import search

__all__ = [
    "METHODS",
    "Choice",
    "Cost",
    "Node",
    "Policy",
    "SearchResult",
    "cross_validated",
    "fit_policy",
    "quantile_bins",
    "search",
]
