"""From figures to docs/performance.md."""
