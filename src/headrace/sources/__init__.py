"""Databases whose changes can be captured, one folder each."""
