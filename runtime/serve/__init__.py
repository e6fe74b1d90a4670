"""A model behind HTTP: `bonnx serve`. Needs the extra `serve`."""

from .app import create_app
from .settings import Settings

__all__ = ["Settings", "create_app"]
