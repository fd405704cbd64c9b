"""Resolves an agent's name to its configuration."""
