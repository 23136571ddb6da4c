"""How groups with minima, and super-blocks of groups whose scales are integers, are searched: in torch and natively."""
