"""Where rows arrive."""
