"""How codes are chosen: chains of transforms and one solver, what they are given (statistics of a layer's inputs), and
what they return."""
