"""Several runs at once: sweeps, and pipelines whose stages follow one another."""
