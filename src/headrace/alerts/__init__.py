"""Alerts: rules, a durable store, grouping, and channels; see docs/alerts.md."""
