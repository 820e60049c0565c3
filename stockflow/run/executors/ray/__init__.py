"""The Ray executor: long-lived actors fed by a ``ray.wait`` loop. The words tensor and checkpoint do not occur.

The driver owns every retry: Ray restarts nothing by itself (``max_restarts=0``), so that causes are counted
apart and a poisoned item cannot loop. Running an item twice is harmless: both runs write the same bytes.
"""

from stockflow.run.executors.ray.cluster import RayOptions, connected, reached
from stockflow.run.executors.ray.loop import run

__all__ = ["RayOptions", "connected", "reached", "run"]
