"""How codes are chosen: chains of transforms and one solver, and what they are given and return.

Everything here is arithmetic on matrices and their statistics: nothing knows of models, files or the calibrated loop.
"""
