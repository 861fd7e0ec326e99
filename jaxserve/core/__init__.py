"""The pure and jittable part: the step and its loops, the model on a step's rows, sampling, the scheduler, the cache."""
