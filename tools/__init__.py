"""What makes parts of the project out of others; nothing of it is in the package."""
