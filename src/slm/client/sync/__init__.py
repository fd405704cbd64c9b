"""Keeps the cache equal to the SLM server."""
