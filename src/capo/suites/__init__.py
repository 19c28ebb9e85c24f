"""The evaluation suites that ship with the package, as TOML."""
