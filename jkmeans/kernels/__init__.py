"""Hand-written device kernels, each beside the plain function it must equal."""
