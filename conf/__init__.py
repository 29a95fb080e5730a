"""The Hydra configs; a package, so that other applications can name it on their search path."""
