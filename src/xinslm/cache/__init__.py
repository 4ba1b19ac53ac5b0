"""The teacher cache: its entries, what fills them, merging several into one."""
