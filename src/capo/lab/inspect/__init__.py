"""The token report: `build_inspection` writes one HTML file, `serve` shows a run too big for one."""

from __future__ import annotations

from capo.lab.inspect.page import LIMIT_MB, Written, build_inspection
from capo.lab.inspect.server import serve

__all__ = ["LIMIT_MB", "Written", "build_inspection", "serve"]
