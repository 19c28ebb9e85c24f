"""``capo bench warning``: how early collapses are warned of, and how often stable runs are."""
