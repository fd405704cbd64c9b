"""The routes: each translates a request, calls one thing, and translates the answer back."""
