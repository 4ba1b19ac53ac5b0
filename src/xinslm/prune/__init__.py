"""A student that starts with part of its teacher's skill: layers, width, heads and vocabulary cut
by measurement.
"""
