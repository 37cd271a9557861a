"""Working on models: found, shown, previewed, tested and held to what was recorded of them."""
