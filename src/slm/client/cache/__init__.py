"""What the client knows, in memory and on disk."""
