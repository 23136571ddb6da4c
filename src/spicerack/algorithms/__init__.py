"""How codes are chosen: chains of transforms and one solver, and what they are given and return.

    method                  a chain by its names, and which is best for what
    solver transform        what a file in solvers/ or transforms/ says of itself
    stats                   what flows into a layer, in memory that does not grow
    columns rescaling       a quantized weight column by column; scales by least squares
    descent                 what learners have in common
    solved                  what comes back

Everything here is arithmetic on matrices and their statistics: nothing knows of models, files or the calibrated loop.
"""
