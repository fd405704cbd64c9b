"""From the kept results to docs/performance.md."""
