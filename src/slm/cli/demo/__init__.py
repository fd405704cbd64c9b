"""`slm demo`: the tour and the processes it runs."""
