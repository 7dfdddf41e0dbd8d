"""How a series of exposures is taken."""
