"""Helpers of the tests of providers."""
