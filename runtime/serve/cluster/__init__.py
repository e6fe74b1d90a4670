"""The server on Ray Serve: an ingress gives each request to one of several replicas. Needs the extra `ray`."""

from .deploy import Scale, deploy, run_until_told

__all__ = ["Scale", "deploy", "run_until_told"]
