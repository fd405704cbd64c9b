"""The SDK: everything a backend needs to follow an SLM. Knows nothing about the server.

The public names are exported by `slm`; none here, so that each module loads only what it needs.
"""
