"""Delivers each committed change to every subscriber."""
