"""`/health` and `/metrics`, for monitoring."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from ..service import Service

__all__ = ["add"]


def add(routes: APIRouter, service: Service) -> None:
    """Declare the endpoints."""

    @routes.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server can answer requests."""
        service.check_intact()
        return {"status": "ok", "model": service.name}

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counters in Prometheus' text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
