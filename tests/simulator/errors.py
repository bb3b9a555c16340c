"""What the simulator raises."""


class KernelBug(Exception):
    """A kernel does what a GPU would not forgive, or would do differently every time."""
