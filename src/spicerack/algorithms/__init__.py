"""How codes are chosen: chains of transforms and one solver, and what they are given and return."""
