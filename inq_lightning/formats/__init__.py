"""Files of quantized networks: each module writes, reads and recognizes one format."""
