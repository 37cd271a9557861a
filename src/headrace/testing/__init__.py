"""What tests and the demo run on: a throw-away Postgres and a shop that keeps it busy."""
