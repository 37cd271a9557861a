"""Models: from raw changes to typed, checked rows."""
