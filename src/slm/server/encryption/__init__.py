"""API keys at rest, and the keys that encrypt them."""
