"""The immutable log of what was captured."""
