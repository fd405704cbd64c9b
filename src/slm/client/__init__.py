"""The SDK: everything a backend needs to follow an SLM. Knows nothing of the server.

The public names are those of `slm`; here are none, so that each module loads only what it needs.
"""
