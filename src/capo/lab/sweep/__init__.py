"""Grids of runs: a TOML file → one run directory a point → one table.

`grid` says what is compared, `drive` makes the runs that are missing, `reading` and `table` say what
came out. A point's directory is named after its configuration, so grids share runs.
"""
