"""How many workers there should be: the decision, its journal, its simulation and the plan. No I/O but
files."""
