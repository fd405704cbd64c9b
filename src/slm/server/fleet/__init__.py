"""Who listens, and who has what."""
