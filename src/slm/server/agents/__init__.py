"""The rules of agents: their rows, changes, keys and history."""
