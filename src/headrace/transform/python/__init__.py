"""Python models: files read and run in processes of their own, and what comes back judged like SQL's rows."""
