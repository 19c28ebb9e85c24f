"""Reports on training runs: `build_report` writes one HTML file and its figures."""

from __future__ import annotations

from capo.lab.report.page import build_report

__all__ = ["build_report"]
