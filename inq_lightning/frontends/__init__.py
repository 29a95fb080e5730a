"""When the algorithm is called, in each kind of training loop."""
