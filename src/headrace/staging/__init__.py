"""Raw tables: every change as the source wrote it."""
