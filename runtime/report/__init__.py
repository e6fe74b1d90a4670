"""What a search did, as one page for a browser or as text for a terminal; numpy is not needed."""

from .page import page
from .read import Figure, Report, SearchRecord, read_run
from .terminal import show

__all__ = ["Figure", "Report", "SearchRecord", "page", "read_run", "show"]
