"""The endpoints: every module of this folder is one, or a few that belong together, and has `add(routes, service)`."""

from __future__ import annotations

import importlib
import pkgutil

from fastapi import APIRouter

from ..json_route import JsonRoute
from ..service import Service

__all__ = ["all_routes"]


def all_routes(service: Service) -> APIRouter:
    """The routes of every endpoint; bodies are JSON unless an endpoint says otherwise."""
    routes = APIRouter(route_class=JsonRoute)
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}").add(routes, service)
    return routes
