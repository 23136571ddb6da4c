"""What training in few bits gains and costs."""
