"""One graph of jobs for a run or a sweep, and the engines that work through it."""
