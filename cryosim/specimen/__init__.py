"""What stands in the beam: atoms, their potential, ice, and how they are put together."""
