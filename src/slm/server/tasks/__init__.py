"""Background tasks and taking turns in one event loop. Knows nothing of SLM."""
