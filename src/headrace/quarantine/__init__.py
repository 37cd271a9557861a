"""Changes that could not be applied, and their way back."""
