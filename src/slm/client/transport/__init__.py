"""The client's connections to the SLM server."""
