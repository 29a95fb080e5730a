"""Networks of whole numbers: what a device without a multiplier computes."""
