"""From a float folder, or a module, to a quantized one."""
