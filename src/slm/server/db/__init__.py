"""One way to the database."""
