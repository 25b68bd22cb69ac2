"""The parts of `sda_fast.plan`: a step of training on fake tensors, with its memory and work written down."""
