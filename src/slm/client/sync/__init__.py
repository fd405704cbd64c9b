"""Keeps the cache in sync with the SLM server."""
