"""The teacher cache: its records, what fills them, merging several into one."""
