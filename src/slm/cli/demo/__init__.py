"""`slm demo`: the tour and the processes that it runs."""
