"""Generation: sampling, text assembly, paged cache, step loop."""
