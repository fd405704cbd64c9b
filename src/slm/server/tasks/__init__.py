"""Background tasks, and sharing one event loop fairly. Knows nothing about SLM."""
