"""The training application behind `inq-train` and `inq-plan`."""
