"""Alembic's scripts; `slm.server.lifecycle.startup` runs them, with no alembic.ini.

A migration changes tables alone: it knows no encryption key and imports nothing of the server, so
that it does the same in a year.
"""
