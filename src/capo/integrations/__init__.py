"""Integrations: thin, lazily imported bridges to training engines."""
