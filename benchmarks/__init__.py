"""How fast things are, and how they were measured."""
