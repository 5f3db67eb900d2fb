"""Where time and memory of a training step go: ranges, a profiler over chosen steps, FLOPs and what they cost."""
