"""Tracks which backends listen and what each has applied."""
