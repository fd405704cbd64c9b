"""Helpers of the fault tests."""
