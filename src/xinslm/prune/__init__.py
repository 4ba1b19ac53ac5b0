"""Initialize a student from its teacher: prune layers, width, heads and vocabulary by measured
importance.
"""
