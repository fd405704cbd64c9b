"""From a commit to every subscriber."""
