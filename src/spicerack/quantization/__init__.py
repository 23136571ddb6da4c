"""From a float folder, or a module, to a quantized one: which tensor gets which numbers, in how much memory, and the
run that does it."""
