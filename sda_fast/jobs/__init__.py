"""The parts of the two long jobs, `sda_fast.train` and `sda_fast.embed`."""
