"""One module for each endpoint; to add one, write `add(routes, service)` in a new module and list it here."""

from __future__ import annotations

from fastapi import APIRouter

from ..json_route import JsonRoute
from ..service import Service
from . import best_of_n, health, rerank, score

__all__ = ["json_routes"]


def json_routes(service: Service) -> APIRouter:
    """Every endpoint but those of the Open Inference Protocol."""
    routes = APIRouter(route_class=JsonRoute)
    for endpoint in (rerank, score, best_of_n, health):
        endpoint.add(routes, service)
    return routes
