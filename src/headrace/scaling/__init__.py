"""How many workers there should be: measuring, the decision, its journal, what is told of it, its simulation
and the plan. No I/O but files, and an address to ask at."""
