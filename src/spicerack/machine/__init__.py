"""What a program runs on: devices, processes that work together, memory."""
