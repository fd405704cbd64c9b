"""What the benches run on: servers, data, figures."""
