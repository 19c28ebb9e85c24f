"""``capo bench trust-region``: how the trust region compares, with every figure measured.

`plan` says what is compared, `stages` in which order, `execute` makes one run, `pool` many of them,
`outcome` and `statistics` say what came out, `goals`, `figures` and `report` write it down.
"""
