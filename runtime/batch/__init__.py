"""Files of prompts and candidates, ranked row by row: `bonnx batch`."""

from .run import Summary, here, run_batch
from .worker import Task

__all__ = ["Summary", "Task", "here", "run_batch"]
