"""`xinslm benchmark`: tasks, speed and memory of a model, next to another one."""
