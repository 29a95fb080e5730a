"""INQ in a Lightning Trainer."""
