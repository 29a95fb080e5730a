"""A trained network quantized without training: each layer solved for, from the input to the output."""
