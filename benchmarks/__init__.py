"""What docs/performance.md is made of: the SLM and what people know, measured side by side.

`python -m benchmarks` measures, writes benchmarks/results/*.json and docs/performance.md from them.
Nothing of the package imports this; it reaches the server and the SDK as a user does.
"""
