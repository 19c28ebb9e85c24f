"""``capo doctor``: what is installed, what of it really works, and what to do about the rest.

`plan` lists what is to be tried from what the package metadata says, `running` tries it in worker processes
(a broken library may end its process, or never return), `probes` holds what is tried, `show` prints it.
"""

from capo.doctor.finding import Finding
from capo.doctor.running import examine

__all__ = ["Finding", "examine"]
