"""Sockets, HTTP, TLS and WebSockets, below the application."""
