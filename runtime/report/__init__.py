"""What a search did, as one page for a browser or as text for a terminal; numpy is not needed."""

from .page import page
from .read import Figure, Report, Search, read_run
from .terminal import show

__all__ = ["Figure", "Report", "Search", "page", "read_run", "show"]
