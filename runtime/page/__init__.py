"""A page that runs an artifact in the visitor's browser."""

from .write import Page, write_page

__all__ = ["Page", "write_page"]
