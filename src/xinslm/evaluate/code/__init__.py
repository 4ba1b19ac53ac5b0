"""Runs code that models write, in limited processes, and scores it: HumanEval, pass@k."""
