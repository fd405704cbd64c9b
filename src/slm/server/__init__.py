"""The SLM server."""
