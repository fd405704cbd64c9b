"""Live LLM configuration for every agent a company runs."""
