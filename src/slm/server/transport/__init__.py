"""Sockets, HTTP, TLS and WebSockets, beneath the application."""
