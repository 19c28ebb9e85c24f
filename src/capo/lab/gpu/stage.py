"""One stage in a process of its own: ``python -m capo.lab.gpu.stage NAME SCALE FILE``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from capo.lab.gpu.ceilings import about
from capo.lab.gpu.sizes import sizes_of
from capo.lab.gpu.timing import Record


def main(arguments: list[str]) -> int:
    """Run the stage and write its record."""
    name, scale, path = arguments
    warnings.simplefilter("ignore", FutureWarning)
    sizes = sizes_of(scale)
    if name == "small":
        from capo.lab.gpu import checks

        checks.small()
        return 0
    record = Record(Path(path), stage=name, scale=scale, about=about())
    if name == "checks":
        from capo.lab.gpu import checks

        checks.run(sizes, record)
    elif name == "core":
        from capo.lab.gpu import core

        core.run(sizes, record)
    else:
        from capo.lab.gpu import step

        step.run(sizes.policies[int(name.removeprefix("step"))], record)
    record.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
